"""Which long runs each study has.

``paper``: the paper's rates, three optimizers, several seeds. ``search``: two decades of rates for each optimizer on
5,000 steps. ``tuned``: each optimizer at the best rate of the search, 50,000 steps. ``sizes``: r against d at the best
rates.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from tools.paper.studies.long_runs import STEPS, LongRun
from tools.paper.studies.long_text import LongText

Records = Sequence[dict[str, Any]]
OPTIMIZERS = ("lion_paper", "sgd_paper", "sgd_paper_no_momentum")
SEEDS = {"gpt": 3, "bert": 1}
FIRST_SEED = 1234  # the recipes'
SHORT = 5000  # steps of a run of the search, and of the sizes
# Half a decade apart. The paper's rates are the lowest of Lion's, and far below SGD's.
RATES = {
    "lion_paper": ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3"),
    "sgd_paper": ("1e-2", "3e-2", "1e-1", "3e-1", "1"),
    "adamw": ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2"),
}
# As the paper's recipes have it: the search is over the rate only.
COMMON = ("weight-decay=0.01", "norm-ratio-interval=1000")
# Of as many layers as all runs; d is 40 thousand to 9.7 million. Above 2 million parameters: Lion only, 1,000 steps.
WIDTHS = {16: 40_384, 40: 124_000, 80: 324_800, 128: 667_136, 192: 1_295_616, 328: 3_283_936, 592: 9_678_016}
LARGE, FEW_STEPS = 2_000_000, 1000


def paper(output: Path, texts: dict[str, LongText], records: Records) -> list[LongRun]:
    """Each optimizer's first seed first."""
    return [
        LongRun(model=model, optimizer=optimizer, seed=FIRST_SEED + number, output=output, text=text)
        for model, text in texts.items()
        for number in range(SEEDS[model])
        for optimizer in OPTIMIZERS
    ]


def search(output: Path, texts: dict[str, LongText], records: Records) -> list[LongRun]:
    """One seed of each rate."""
    return [
        LongRun(
            **{"model": "gpt", "optimizer": optimizer, "seed": FIRST_SEED, "output": output, "text": texts["gpt"]},
            **{"study": "search", "label": f"search-{rate}", "changes": _at_rate(rate)},
            **{"steps": SHORT, "checkpoints": ()},
        )
        for optimizer, rates in RATES.items()
        for rate in rates
    ]


def tuned(output: Path, texts: dict[str, LongText], records: Records) -> list[LongRun]:
    """Three seeds of each optimizer at its best rate. Raises LionError while the search is not finished."""
    return [
        LongRun(
            **{"model": "gpt", "optimizer": optimizer, "seed": FIRST_SEED + number},
            **{"output": output, "text": texts["gpt"], "study": "tuned", "label": "tuned"},
            changes=(*_at_rate(rate), f"lr-warmup-iters={STEPS // 100}"),  # AdamW's recipe has more
        )
        for number in range(SEEDS["gpt"])
        for optimizer, rate in best_rates(records).items()
    ]


def sizes(output: Path, texts: dict[str, LongText], records: Records) -> list[LongRun]:
    """Each width at the best rates of the search. Raises LionError while it is not finished."""
    found = []
    for width, d in WIDTHS.items():
        steps = FEW_STEPS if d > LARGE else SHORT
        for optimizer, rate in best_rates(records).items():
            if d <= LARGE or optimizer == "lion_paper":
                run = LongRun(
                    **{"model": "gpt", "optimizer": optimizer, "seed": FIRST_SEED, "output": output},
                    **{"text": texts["gpt"], "study": "sizes", "label": f"width-{width}", "steps": steps},
                    changes=(*_at_rate(rate), f"hidden-size={width}"),
                    checkpoints=tuple(sorted({FEW_STEPS, steps})),
                )
                found.append(run)
    return found


PLANS: dict[str, Callable[[Path, dict[str, LongText], Records], list[LongRun]]] = {
    "paper": paper,
    "search": search,
    "tuned": tuned,
    "sizes": sizes,
}


def best_rates(records: Records) -> dict[str, str]:
    """The rate of each optimizer with the lowest held-out loss at the search's last step. Diverged runs are not chosen.

    Raises LionError where the search is not finished.
    """
    losses: dict[str, dict[str, float]] = {optimizer: {} for optimizer in RATES}
    for record in records:
        if record["study"] == "search":
            rate = f"{record['settings']['lr']:g}"
            loss = record["validation_loss"][str(SHORT)]
            losses[record["optimizer"]][rate] = loss if math.isfinite(loss) else math.inf
    done = sum(len(by_rate) for by_rate in losses.values())
    if done < (all_of := sum(map(len, RATES.values()))):
        raise LionError(f"{done} of {all_of} runs of --study search are finished; finish it first, it gives the rates")
    return {optimizer: min(by_rate, key=by_rate.__getitem__) for optimizer, by_rate in losses.items()}


def _at_rate(rate: str) -> tuple[str, ...]:
    return (f"lr={rate}", f"min-lr={float(rate) / 10:g}", *COMMON)
