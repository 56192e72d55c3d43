"""Which long runs each study has.

``paper``: the paper's rates, three optimizers, several seeds. ``search``: two decades of rates for each optimizer on
5,000 steps, and further ones while the best is at an end. ``tuned``: each optimizer at the best rate of the search,
50,000 steps. ``sizes``: r against d. Each optimizer has its best rate, and Lion also a tenth of that.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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
    "lion_paper": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "sgd_paper": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
# Megatron's SGD adds weight decay to the gradient, Lion and AdamW to the step: at tuned rates they would minimize
# different functions.
COMMON = ("weight-decay=0", "norm-ratio-interval=1000")
# Of as many layers as all runs. Seven sizes of all optimizers; above 2 million parameters Lion only, 1,000 steps. The
# seven sizes have a second seed of 1,000 steps: there r differs so much between seeds that one decides little.
WIDTHS = {
    **{16: 40_384, 24: 65_184, 40: 124_000, 56: 195_104, 80: 324_800, 128: 667_136, 192: 1_295_616},
    **{328: 3_283_936, 592: 9_678_016},
}
LARGE, FEW_STEPS = 2_000_000, 1000
_SCHEDULE = (f"lr-decay-iters={SHORT}", f"lr-warmup-iters={SHORT // 100}")  # also where a run ends before


def paper(output: Path, texts: dict[str, LongText], records: Records) -> list[LongRun]:
    """Each optimizer's first seed first."""
    return [
        LongRun(model=model, optimizer=optimizer, seed=FIRST_SEED + number, output=output, text=text)
        for model, text in texts.items()
        for number in range(SEEDS[model])
        for optimizer in OPTIMIZERS
    ]


def search(output: Path, texts: dict[str, LongText], records: Records) -> list[LongRun]:
    """One seed of each rate. With ``records`` of them all, also the next rate where the best is at an end."""
    losses = search_losses(records)
    return [
        LongRun(
            **{"model": "gpt", "optimizer": optimizer, "seed": FIRST_SEED, "output": output, "text": texts["gpt"]},
            **{"study": "search", "label": f"search-{rate:g}", "changes": _at_rate(rate)},
            **{"steps": SHORT, "checkpoints": ()},
        )
        for optimizer in RATES
        for rate in searched_rates(optimizer, losses[optimizer])
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
    """Each width at the best rates of the search, the first seed first. Raises LionError while that is not finished.

    Lion also has a tenth of its best rate: its step has the same size in each weight, so a rate that is the best at
    one width may be too large for wider models.
    """
    best = best_rates(records)
    rates = [("", *each) for each in best.items()] + [("tenth-", "lion_paper", best["lion_paper"] / 10)]
    found = []
    for seed, (width, d) in itertools.product((FIRST_SEED, FIRST_SEED + 1), WIDTHS.items()):
        is_first, is_large = seed == FIRST_SEED, d > LARGE
        steps = SHORT if is_first and not is_large else FEW_STEPS
        for prefix, optimizer, rate in rates:
            if not is_large or (is_first and optimizer == "lion_paper"):
                run = LongRun(
                    **{"model": "gpt", "optimizer": optimizer, "seed": seed, "output": output},
                    **{"text": texts["gpt"], "study": "sizes", "label": f"{prefix}width-{width}", "steps": steps},
                    changes=(*_at_rate(rate), f"hidden-size={width}", *_SCHEDULE),
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


def search_losses(records: Records) -> dict[str, dict[float, float]]:
    """The validation loss at the search's last step by optimizer, then by rate; infinite where the run diverged."""
    losses: dict[str, dict[float, float]] = {optimizer: {} for optimizer in RATES}
    for record in records:
        if record["study"] == "search":
            loss = record["validation_loss"][str(SHORT)]
            losses[record["optimizer"]][record["settings"]["lr"]] = loss if math.isfinite(loss) else math.inf
    return losses


def searched_rates(optimizer: str, losses: Mapping[float, float]) -> list[float]:
    """``RATES``, and rates beyond an end while that has the lowest of ``losses``."""
    rates = list(RATES[optimizer])
    while all(rate in losses for rate in rates):
        best = min(rates, key=losses.__getitem__)
        if best == rates[-1]:
            rates.append(_next(best, 1))
        elif best == rates[0]:
            rates.insert(0, _next(best, -1))
        else:
            break
    return rates


def _next(rate: float, direction: int) -> float:
    """The rate half a decade above (1) or below (-1) a rate of 1 or 3 times a power of ten."""
    number = round(2 * math.log10(rate)) + direction  # of half decades from 1
    return float(f"{3 if number % 2 else 1}e{number // 2}")


def best_rates(records: Records) -> dict[str, float]:
    """The rate of each optimizer with the lowest validation loss at the search's last step.

    Diverged runs are not chosen. Raises LionError where the search is not finished, which it is not while a best rate
    is at an end.
    """
    losses = search_losses(records)
    rates = {optimizer: searched_rates(optimizer, losses[optimizer]) for optimizer in RATES}
    missing = [f"{name} at {rate:g}" for name in RATES for rate in rates[name] if rate not in losses[name]]
    if missing:
        raise LionError(
            f"{len(missing)} of {sum(map(len, rates.values()))} runs of --study search are not finished, the next is "
            f"{missing[0]}. Finish the search first, because it chooses the rates. It adds a rate while the best one "
            "is the highest or the lowest"
        )
    return {optimizer: min(rates[optimizer], key=losses[optimizer].__getitem__) for optimizer in RATES}


def _at_rate(rate: float) -> tuple[str, ...]:
    return (f"lr={rate:g}", f"min-lr={rate / 10:g}", *COMMON)
