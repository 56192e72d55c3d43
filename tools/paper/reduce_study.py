"""Does Lion learn the same from packed gradients? GPTs on four simulated data-parallel ranks, every arm and seed.

    python -m tools.paper.reduce_study train --data runs/demo/text --records docs/results/reduce-study.jsonl
    python -m tools.paper.reduce_study page --records docs/results/reduce-study.jsonl > docs/results/reduce-study.md

``train`` makes the runs of ``STAGES``, in their order, in one process. Each run appends one line to RECORDS when it
ends, and runs that have a line are not repeated. The learning rate of each size is the best for the uncompressed arm,
with a seed that no other run has: of ``RATES``, and of half or twice the best as long as that is the lowest or the
highest. ``--data`` is a folder made by ``tools/demo_text.py --vocab-size 512``.

``page`` prints the results: for each arm the mean validation loss, and its relative difference from the uncompressed
arm of the same seed: mean, 95 % interval of the mean (Student's t), and whether that interval is within --margin, which
is a test of equivalence at 2.5 % on each side.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lion.run import readable_errors
from tools.paper import theory
from tools.paper.studies.rank_gpt import Shape

REFERENCE = "fp32"
ARMS = ("fp32", "bf16", "int8", "int4", "int4-none", "ternary", "ternary-none", "1bit", "vote")
SHAPES = {"tiny": Shape(layers=2, hidden=128), "large": Shape(layers=6, hidden=256)}
RATES = (5e-4, 1e-3, 2e-3)
TUNING_STEPS, TUNING_SEED = 300, 0
MARGIN = 0.005
HEADER = """# Learning with packed gradients

Does Lion learn the same with [`--lion-reduce`](../exchange.md#packed-gradients-experimental)? GPTs on four
simulated data-parallel ranks in one process, in fp32. The gradient of each rank is packed, sent and summed by the
code of `--lion-reduce`, with int8 error feedback unless the arm says `none`. With Megatron's GPT, this simulation
trains the weights that four real ranks train, bit for bit (`tests/tools/test_reduce_study.py`).

    python tools/demo_text.py --output runs/text --vocab-size 512
    python -m tools.paper.reduce_study train --data runs/text --records docs/results/reduce-study.jsonl
    python -m tools.paper.reduce_study page --records docs/results/reduce-study.jsonl > docs/results/reduce-study.md

28 and 29 November 2026, one core of an Intel Xeon that other work shared; this changes the times, not the losses.
Python's documentation, a vocabulary of 512, 2 sequences of 64 tokens a rank and step, betas 0.9 and 0.95, weight
decay 0.1, clipping at 1, 20 steps of warm-up and a cosine to a tenth. The learning rate is the best for `fp32` at
300 steps, and the same for all arms. Seeds are those of the initialization and of the data. `fp32` is the exact
sum. `bf16` rounds gradients before they are sent, which is the noise of a common setting. `1bit` has fp32 error
feedback; `vote` is Distributed Lion with majority vote, where each rank clips its own gradient. The package has
neither of the two, and their learning rate was not tuned either. An arm has no verdict before all its seeds are
finished.

"difference" is the mean of loss / loss of `fp32` - 1 over the seeds, with the 95 % interval of that mean (Student's
t). "equal within 0.5 %" means that the whole interval is within 0.5 %, a test of equivalence at 2.5 % on each side.
"signs unlike" is the share of signs of updates that the exact gradient would change, |e|/|g| the norm of the
residuals relative to the gradient's, in 10 sampled steps.
"""
Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Runs of one size and length: every arm with every seed from 1."""

    size: str
    steps: int
    arms: tuple[str, ...] = ARMS
    seeds: int = 5

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Arm and seed, seed by seed, so that what is finished can be compared."""
        return [(arm, seed) for seed in range(1, self.seeds + 1) for arm in self.arms]


STAGES = (
    Stage("tiny", 300),
    Stage("tiny", 3000, ("fp32", "bf16", "int4", "int4-none", "ternary")),
    Stage("large", 300),
)


def train(data: Path, path: Path, stages: Sequence[Stage]) -> None:
    """Make the runs that have no record yet."""
    from tools.paper.studies.rank_training import Corpus
    from tools.paper.studies.rank_training import train as train_run

    corpus = Corpus.read(data)

    def run(size: str, steps: int, arm: str, seed: int, lr: float) -> None:
        key = {"size": size, "steps": steps, "arm": arm, "seed": seed, "lr": lr}
        if any(key.items() <= record.items() for record in records(path)):
            return
        taken = train_run(arm, SHAPES[size], corpus, seed=seed, steps=steps, lr=lr)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(key | taken) + "\n")
        print(time.strftime("%H:%M:%S"), key, f"{taken['validation']:.4f}, {taken['cpu_seconds']} s", flush=True)

    for stage in stages:
        rates = list(RATES)
        while rates:
            run(stage.size, TUNING_STEPS, REFERENCE, TUNING_SEED, rates.pop())
            if not rates:
                rates = next_rates(records(path), stage.size)
        lr = best_rate(records(path), stage.size)
        for arm, seed in stage.runs:
            run(stage.size, stage.steps, arm, seed, lr)


def records(path: Path) -> list[Record]:
    """Those of the runs that have ended."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def tuning_losses(found: Sequence[Record], size: str) -> dict[float, float]:
    """The validation loss of each tuning run of ``size``, by its learning rate, ascending."""
    runs = [record for record in found if record["size"] == size and record["seed"] == TUNING_SEED]
    return dict(sorted((float(record["lr"]), float(record["validation"])) for record in runs))


def best_rate(found: Sequence[Record], size: str) -> float:
    """The learning rate with the lowest validation loss in the tuning runs of ``size``."""
    losses = tuning_losses(found, size)
    return min(losses, key=losses.__getitem__)


def next_rates(found: Sequence[Record], size: str) -> list[float]:
    """What is still to be tried: half or twice the best rate, if that is the lowest or the highest so far."""
    rates, best = list(tuning_losses(found, size)), best_rate(found, size)
    return [best / 2] if best == rates[0] else [2 * best] if best == rates[-1] else []


def difference(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean of the relative differences, and half of the 95 % interval of that mean; infinite for one seed."""
    relative = [loss / exact - 1 for loss, exact in zip(losses, reference, strict=True)]
    if len(relative) == 1:
        return relative[0], math.inf
    return statistics.mean(relative), theory.half_width(torch.tensor(relative, dtype=torch.float64)).item()


def verdict(mean: float, half: float, margin: float) -> str:
    """What the interval says about an arm."""
    if max(abs(mean - half), abs(mean + half)) <= margin:
        return f"equal within {margin:.1%}"
    if mean - half > margin:
        return f"worse by more than {margin:.1%}"
    if mean - half > 0:
        return f"worse; more than {margin:.1%} is not excluded"
    if mean + half < 0:
        return f"better; more than {margin:.1%} is not excluded"
    return f"not shown: the interval exceeds {margin:.1%}"


def table(found: Sequence[Record], stage: Stage, margin: float) -> Iterator[str]:
    """Markdown: one row for each arm that has a run with a seed that the uncompressed arm has too."""
    by_arm = {
        arm: {record["seed"]: record for record in found if record["arm"] == arm and record["seed"] != TUNING_SEED}
        for arm in stage.arms
    }
    names = (
        "arm",
        "seeds",
        "validation loss",
        "difference",
        "95 % interval",
        "signs unlike",
        "\\|e\\|/\\|g\\|",
        "verdict",
    )
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for arm, runs in by_arm.items():
        seeds = sorted(runs.keys() & by_arm[REFERENCE].keys())
        if not seeds:
            continue
        losses, exact = ([runs_of[seed]["validation"] for seed in seeds] for runs_of in (runs, by_arm[REFERENCE]))
        row = f"| {arm} | {len(seeds)} of {stage.seeds} | {statistics.mean(losses):.4f} |"
        if arm == REFERENCE:
            yield f"{row} | | | | |"
            continue
        mean, half = difference(losses, exact)
        interval = f"{mean - half:+.2%} .. {mean + half:+.2%}" if math.isfinite(half) else "unknown"
        unlike = _mean([runs[seed].get("unlike") for seed in seeds], "{:.1%}")
        residual = _mean([runs[seed].get("residual") for seed in seeds], "{:.2f}")
        said = verdict(mean, half, margin) if len(seeds) == stage.seeds else "not finished"
        yield f"{row} {mean:+.2%} | {interval} | {unlike} | {residual} | {said} |"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.mean(known)) if known else ""


def page(found: Sequence[Record], margin: float) -> Iterator[str]:
    """The tables of all stages, and how far each is."""
    yield HEADER
    for stage in STAGES:
        shape = SHAPES[stage.size]
        of_size = [record for record in found if record["size"] == stage.size]
        these = [r for r in of_size if r["steps"] == stage.steps and (r["arm"], r["seed"]) in stage.runs]
        parameters = sum(math.prod(size) for size in shape.parameters().values())
        yield f"## {parameters / 1e6:.2f} million parameters, {stage.steps} steps\n"
        yield f"{len(these)} of {len(stage.runs)} runs are finished.\n"
        if these:
            seconds = sum(record["cpu_seconds"] for record in these)
            sizes = f"{shape.layers} layers, {shape.hidden} channels, lr {these[0]['lr']:g}"
            yield f"{sizes}. {seconds:.0f} s of CPU time.\n"
            yield from table(these, stage, margin)
            yield ""
        tuning = tuning_losses(found, stage.size)
        if tuning and stage.steps == TUNING_STEPS:
            rates = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in tuning.items())
            yield f"Validation loss of `fp32` by lr, with a separate seed: {rates}.\n"


def main() -> None:
    """Train what is missing, or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "page"))
    parser.add_argument("--records", type=Path, required=True, help="JSON lines, one for each run that has ended")
    parser.add_argument("--data", type=Path, help="train: folder made by tools/demo_text.py")
    parser.add_argument(
        "--sizes", nargs="+", choices=SHAPES, default=list(SHAPES), help="train: only these (default: all)"
    )
    parser.add_argument("--margin", type=float, default=MARGIN, help="page: of equivalence (default: %(default)s)")
    options = parser.parse_args()
    if options.action == "page":
        print("\n".join(page(records(options.records), options.margin)))
        return
    if options.data is None:
        parser.error("train needs --data")
    train(options.data, options.records, [stage for stage in STAGES if stage.size in options.sizes])


if __name__ == "__main__":
    with readable_errors():
        main()
