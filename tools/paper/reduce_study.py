"""Does Lion learn the same from packed gradients? Tiny GPTs on simulated data-parallel ranks, every arm and seed.

    python -m tools.paper.reduce_study --data runs/demo/text --output runs/reduce [--arms fp32 bf16 int4] [--seeds 5]

Trains the recipe tiny_gpt for every seed and arm of tools/paper/studies/simulated_ranks.py, whose four micro-batches
stand for four ranks. Each run is one process. Complete runs in OUTPUT are kept, with a record of a few lines each, so
that a study that was stopped goes on. Prints for each arm the mean validation loss and its relative difference from
the uncompressed arm of the same seed: mean, 95 % interval of the mean (Student's t), and whether that interval lies
within --margin, which is a test of equivalence at 2.5 % on each side.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from scipy.special import stdtrit

from launch.launcher import commands, recipe_checks, recipes
from megatron_lion.run import readable_errors
from megatron_lion.training_log import read_training_log
from tools.paper.studies.megatron_runs import CPU, MegatronRun, run_all

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "paper" / "studies" / "simulated_ranks.py"
REFERENCE = "fp32"
ARMS = ("fp32", "bf16", "int8", "int4", "int4-none", "ternary", "ternary-none", "1bit", "vote")


def run_of(arm: str, seed: int, options: argparse.Namespace) -> MegatronRun:
    """One arm with one seed: of the initialization and of the order of the data."""
    steps = options.iterations
    overrides = [f"data={options.data}", f"seed={seed}", f"train-iters={steps}", f"lr-decay-iters={steps}"]
    overrides += [f"run={options.output}", f"eval-interval={steps}", "norm-ratio-interval=0", "gpus-per-node=1"]
    recipe = recipes.resolve("tiny_gpt", "lion", "cpu", [*overrides, *options.overrides])
    recipe_checks.check(recipe)
    drop = ("save", "load", "save-interval", "tensorboard-dir")
    words = commands.training_flags(recipe, [])
    kept = [word for at, word in enumerate(words) if not {word[2:], words[at - 1][2:]} & {*drop}]
    folder = options.output / f"{arm}_{steps}_{seed}"
    return MegatronRun(folder=folder, flags=f"{arm} {' '.join(kept)} {CPU}", script=SCRIPT)


def record(run: MegatronRun) -> dict[str, float]:
    """The last validation loss and the milliseconds of a step, kept in the run's folder."""
    log = read_training_log(run.folder / "log.txt")
    found = {"validation": log.final["validation"], "ms": statistics.median(log.milliseconds.values())}
    (run.folder / "record.json").write_text(json.dumps(found) + "\n")
    return found


def difference(losses: list[float], reference: list[float]) -> tuple[float, float]:
    """Mean of the relative differences, and half of the 95 % interval of that mean; infinite for one seed."""
    relative = [loss / exact - 1 for loss, exact in zip(losses, reference, strict=True)]
    if len(relative) == 1:
        return relative[0], math.inf
    quantile = float(stdtrit(len(relative) - 1, 0.975))
    return statistics.mean(relative), quantile * statistics.stdev(relative) / math.sqrt(len(relative))


def table(losses: dict[str, list[float]], margin: float) -> str:
    """Markdown: one row for each arm."""
    names = ("arm", "seeds", "validation loss", "difference", "95 % interval", "within the margin")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for arm, values in losses.items():
        row = f"| {arm} | {len(values)} | {statistics.mean(values):.4f} |"
        if arm == REFERENCE:
            rows.append(f"{row} | | |")
            continue
        mean, half = difference(values, losses[REFERENCE])
        within = "yes" if mean - half >= -margin and mean + half <= margin else "no"
        interval = f"{mean - half:+.2%} .. {mean + half:+.2%}" if math.isfinite(half) else "unknown"
        rows.append(f"{row} {mean:+.2%} | {interval} | {within if math.isfinite(half) else 'unknown'} |")
    return "\n".join(rows)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by tools/demo_text.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what to train (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=300, help="steps of each run (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.005, help="of equivalence, relative (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further keys of the recipe, such as lr=3e-4")
    options = parser.parse_args()
    arms = list(dict.fromkeys([REFERENCE, *options.arms]))
    runs = {arm: [run_of(arm, seed, options) for seed in range(1, options.seeds + 1)] for arm in arms}
    run_all([runs[arm][seed] for seed in range(options.seeds) for arm in arms], threads=1)
    records = {arm: [record(run) for run in found] for arm, found in runs.items()}
    for arm, found in records.items():
        print(f"  {arm}: {statistics.median(one['ms'] for one in found):.0f} ms a step", file=sys.stderr)
    print(table({arm: [one["validation"] for one in found] for arm, found in records.items()}, options.margin))


if __name__ == "__main__":
    with readable_errors():
        main()
