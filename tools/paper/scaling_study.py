"""How the norm ratio r = ||g||_1 / ||g||_2 grows with the number of parameters d: the paper says as sqrt(d).

    python -m tools.paper.scaling_study --text TEXT... --output runs/scaling            trains small GPTs here, on a CPU
    python -m tools.paper.scaling_study --model bert --text TEXT... --output runs/scaling-bert                 or BERTs
    python -m tools.paper.scaling_study --run lion=a/norm_ratio.jsonl --run lion=b/norm_ratio.jsonl ... --output out

The first form pretrains five sizes with Lion, SGD and Adam through Megatron's own loop; the same command goes on where
it was stopped. The second takes the rounds that other runs left, of a cluster for example. Only rounds that converged
count (docs/norm-ratio.md). Leaves scaling.json, scaling.md, exponent.svg and ratio_over_sqrt_d.svg in --output.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from megatron_lion.stats.convergence import GAUSSIAN_RATIO
from tools.compare_runs import named_run
from tools.corpus.shards import write_json
from tools.paper.studies import figures, scaling, texts
from tools.paper.studies.megatron_runs import CPU, LEARNING_RATES, PRETRAIN, MegatronRun, optimizer_flags, run_all

SIZES = {32: 2, 64: 2, 128: 2, 224: 2, 400: 2}  # hidden size: layers; d from 39 thousand to 4 million
HEAD_SIZE = 16
SEQUENCE = 64


def study_runs(options: argparse.Namespace, data: str) -> list[MegatronRun]:
    """The runs of the study, smallest first; rounds before the first step are measured once for each size."""
    runs = []
    for hidden in options.sizes:
        for name in options.optimizers:
            folder = options.output / f"{name}-{hidden}"
            model = f"--num-layers {SIZES[hidden]} --hidden-size {hidden} --num-attention-heads {hidden // HEAD_SIZE}"
            model += f" --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE}"
            warmup = min(10, options.iterations // 3)
            rate = f"--lr-decay-style constant --lr-warmup-iters {warmup} --hidden-dropout 0 --attention-dropout 0"
            steps = f"--train-iters {options.iterations} --micro-batch-size 16 --global-batch-size 16"
            quiet = "--eval-iters 0 --eval-interval 100000 --log-interval 5"
            rounds = f"--norm-ratio-interval {options.interval} --norm-ratio-batches {options.batches}"
            rounds += f" --norm-ratio-file {folder}/norm_ratio.jsonl"
            rounds += " --norm-ratio-at-start" if name == options.optimizers[0] else ""
            flags = (
                f"{model} {steps} {rate} {quiet} {rounds} {optimizer_flags(name)} --seed {options.seed} {data} {CPU}"
            )
            runs.append(MegatronRun(folder=folder, flags=flags, script=PRETRAIN[options.model]))
    return runs


def train(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the text and the runs that are missing; returns the points of all of them."""
    runs = study_runs(options, texts.CORPORA[options.model](options.output / "text", options.text))
    run_all(runs, options.threads)
    return [
        point
        for run in runs
        for point in scaling.read_run(run.folder.name.partition("-")[0], run.folder / "norm_ratio.jsonl")
    ]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """r against d at the last iteration with a fit, and r/sqrt(d) over training."""
    plt = figures.pyplot()
    points = [point for point in result["points"] if point["ratio"]]
    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    sizes = sorted({point["d"] for point in points})
    axes.loglog(sizes, [d**0.5 for d in sizes], color="black", linewidth=0.8, label=r"$\sqrt{d}$, the upper bound")
    axes.loglog(sizes, [GAUSSIAN_RATIO * d**0.5 for d in sizes], "k--", linewidth=0.8, label=r"noise: $\sqrt{2d/\pi}$")
    for name in dict.fromkeys(fit["optimizer"] for fit in result["fits"]):
        fit = [fit for fit in result["fits"] if fit["optimizer"] == name][-1]
        chosen = [p for p in points if p["optimizer"] == name and p["iteration"] == fit["iteration"] and p["converged"]]
        label = f"{figures.NAMES.get(name, name)}, step {fit['iteration']}: {_interval(fit)}"
        axes.loglog(*_columns(chosen, "d"), "o-", color=figures.COLORS.get(name), label=label)
    axes.set(xlabel="d, number of parameters", ylabel=r"$r = \|g\|_1 / \|g\|_2$", title="exponent of r against d")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=8)
    paths = [figures.save(figure, folder / "exponent.svg")]
    names = [name for name in dict.fromkeys(point["optimizer"] for point in points) if name != scaling.START]
    figure, panels = plt.subplots(1, len(names), figsize=(3.3 * len(names), 3.4), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for d in sizes:
            chosen = [p for p in points if p["d"] == d and p["optimizer"] in (name, scaling.START)]
            chosen.sort(key=lambda point: point["iteration"])
            (line,) = panel.plot(*_columns(chosen, "iteration", "ratio_over_sqrt_d"), linewidth=1.2)
            for filled in (True, False):
                part = [point for point in chosen if bool(point["converged"]) is filled]
                face = {"markerfacecolor": line.get_color() if filled else "white", "color": line.get_color()}
                panel.plot(*_columns(part, "iteration", "ratio_over_sqrt_d"), "o", **face)
            line.set_label(f"d = {d:,}")
        panel.axhline(GAUSSIAN_RATIO, color="black", linestyle="--", linewidth=0.8)
        panel.set(title=figures.NAMES.get(name, name), xlabel="step", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(r"$r / \sqrt{d}$ (open: not converged)")
    panels[0][-1].legend(fontsize=7, loc="upper right")
    return [*paths, figures.save(figure, folder / "ratio_over_sqrt_d.svg")]


def _columns(points: list[dict[str, Any]], x: str, y: str = "ratio") -> tuple[list[Any], list[Any]]:
    return [point[x] for point in points], [point[y] for point in points]


def _interval(fit: dict[str, Any]) -> str:
    return f"{fit['exponent']:.3f} [{fit['low']:.3f}, {fit['high']:.3f}]"


def markdown(result: dict[str, Any]) -> str:
    """The fits and the points as tables."""
    lines = ["| optimizer | step | sizes | exponent [95 %] | 0.5 inside |", "|---|---|---|---|---|"]
    for fit in result["fits"]:
        name, inside = figures.NAMES.get(fit["optimizer"], fit["optimizer"]), "yes" if fit["holds_half"] else "no"
        lines.append(f"| {name} | {fit['iteration']} | {fit['sizes']} | {_interval(fit)} | {inside} |")
    lines += [
        "",
        "| optimizer | step | d | loss | r | r / sqrt(d) | snr | converged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in result["points"]:
        name, mark = figures.NAMES.get(p["optimizer"], p["optimizer"]), "yes" if p["converged"] else "no"
        numbers = [_number(p[key], digits) for key, digits in NUMBERS.items()]
        lines.append(f"| {name} | {p['iteration']} | {p['d']:,} | {' | '.join(numbers)} | {mark} |")
    return "\n".join(lines) + "\n"


NUMBERS = {"loss": 3, "ratio": 2, "ratio_over_sqrt_d": 4, "snr": 1}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def parse() -> argparse.Namespace:
    """The command line. Raises LionError for what does not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for runs, figures and results")
    add("--model", choices=texts.CORPORA, default="gpt", help="what is trained, or was (default: %(default)s)")
    add("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text to train on (default: Python's documentation)")
    add("--run", type=named_run, action="append", default=[], metavar="OPTIMIZER=JSONL", help="rounds; repeatable")
    add(
        "--sizes",
        type=int,
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        metavar="H",
        help="hidden sizes to train (default: all)",
    )
    add(
        "--optimizers",
        nargs="+",
        choices=LEARNING_RATES,
        default=list(LEARNING_RATES),
        help="which optimizers (default: all)",
    )
    add("--iterations", type=int, default=30, metavar="N", help="steps of each run (default: %(default)s)")
    add("--interval", type=int, default=15, metavar="N", help="a round after every N steps (default: %(default)s)")
    add("--batches", type=int, default=64, metavar="N", help="batches of a round (default: %(default)s)")
    add("--seed", type=int, default=1234, metavar="N", help="of weights and batches (default: %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="threads of a run (default: %(default)s)")
    options = parser.parse_args()
    if options.run and options.text:
        raise LionError("--run takes rounds that are there, --text trains: give one of them")
    options.text = options.text or []
    return options


def main() -> None:
    """Train or read, fit, draw and write."""
    options = parse()
    began = time.monotonic()
    points = [point for name, path in options.run for point in scaling.read_run(name, path)] or train(options)
    points = scaling.unique(points)
    command = shlex.join(["python", "-m", "tools.paper.scaling_study", *sys.argv[1:]])
    seconds = round(time.monotonic() - began, 1)
    result = scaling.result(points, command, model=options.model, seconds=seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "scaling.json", result)
    text = markdown(result)
    (options.output / "scaling.md").write_text(text, encoding="utf-8")
    print(text)
    for path in draw(result, options.output):
        print(f"figure: {path}")


if __name__ == "__main__":
    with readable_errors():
        main()
