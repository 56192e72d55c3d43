"""The constants c_LION and c_SGD of (A1) and (A2), figure A3, and Lion's early against SGD's late perplexity.

    python -m tools.paper.rate_constants --text TEXT... --evaluate wiki.tokens --output runs/rates   trains on this CPU
    python -m tools.paper.rate_constants --run lion=a/norm_ratio.jsonl --run sgd=b/norm_ratio.jsonl ... --output out

(A2) mean ||grad f||_1 <= c_LION sqrt(d) K^(-1/4), (A1) mean ||grad f||_2 <= c_SGD K^(-1/4), for every K: the smallest
constants that hold at every recorded step. The first form pretrains a tiny GPT with either optimizer and five seeds,
and goes on where it was stopped; the second reads rounds that other runs left, each optimizer's repeats averaged.
Leaves rates.json, rates.md and A3.svg in --output; with --evaluate the perplexities after each fifth of the run too.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.nearest import did_you_mean
from megatron_lion.run import readable_errors
from tools.compare_runs import named_run
from tools.corpus.shards import write_json
from tools.paper.studies import figures, rates, texts
from tools.paper.studies.megatron_runs import CPU, LEARNING_RATES, ROOT, MegatronRun, optimizer_flags, run_all

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64"
BATCH = "--micro-batch-size 16 --global-batch-size 16 --eval-iters 0 --eval-interval 100000 --log-interval 10"
EVALUATE = ROOT / "tools" / "eval_wikitext103.py"


def learning_rates(options: argparse.Namespace) -> dict[str, float]:
    """Of the runs that are trained here; those of --run may tell their own."""
    return {} if options.run else {"lion": LEARNING_RATES["lion"], "sgd": options.sgd_lr}


def study_runs(options: argparse.Namespace, data: str) -> list[MegatronRun]:
    """One run for each seed and optimizer, with rounds, and checkpoints as often as rounds if they are evaluated."""
    interval = options.iterations // options.rounds
    runs = []
    for seed in range(1, options.seeds + 1):
        for name in rates.NORMS:
            folder = options.output / f"{name}-{seed}"
            rounds = f"--norm-ratio-interval {interval} --norm-ratio-batches {options.batches}"
            rounds += f" --norm-ratio-file {folder}/norm_ratio.jsonl"
            if options.evaluate:
                rounds += f" --save {folder}/checkpoints --save-interval {interval} --no-save-optim"
            steps = f"--train-iters {options.iterations} --lr-decay-style cosine --lr-warmup-iters {interval // 2}"
            optimizer = optimizer_flags(name, learning_rates(options)[name])
            flags = f"{MODEL} {BATCH} {steps} {rounds} {optimizer} --seed {seed} {data} {CPU}"
            runs.append(MegatronRun(folder=folder, flags=flags))
    return runs


def evaluated_steps(options: argparse.Namespace) -> list[int]:
    """The checkpoints after each fifth of the run, as in the paper's table A1, or the nearest that there are."""
    interval = options.iterations // options.rounds
    return sorted({interval * max(1, round(options.rounds * part / 5)) for part in range(1, 6)})


def evaluations(options: argparse.Namespace) -> list[MegatronRun]:
    """One for each run's checkpoints, on the text of --evaluate."""
    steps = ",".join(map(str, evaluated_steps(options)))
    found = []
    for seed in range(1, options.seeds + 1):
        for name in rates.NORMS:
            folder = options.output / f"{name}-{seed}" / "perplexity"
            flags = f"--checkpoints {folder.parent}/checkpoints --steps {steps} --text {options.evaluate}"
            flags += f" --overlapping-eval 64 --micro-batch-size 64 --output {folder}/results.json {CPU}"
            found.append(MegatronRun(folder=folder, flags=flags, script=EVALUATE))
    return found


def perplexities(runs: list[MegatronRun], steps: list[int]) -> dict[str, Any]:
    """ln(perplexity) by optimizer, for each seed at ``steps``, with what they say of the paper's claim."""
    values: dict[str, list[list[float]]] = {name: [] for name in rates.NORMS}
    for run in runs:
        results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))["results"]
        each = [math.log(results[str(step)]["perplexity"]) for step in steps]
        values[run.folder.parent.name.partition("-")[0]].append(each)
    return {"steps": steps, **values, **rates.early_against_late(steps, values["lion"], values["sgd"])}


def panel(axes: Any, optimizer: str, entry: dict[str, Any], title: str) -> None:
    """One panel of figure A3: the running mean of the norm (solid) and the smallest constant times the rate (dashed).

    Args:
        axes: matplotlib's, drawn on.
        optimizer: ``lion``, in the l1 norm, or ``sgd``, in the l2 norm.
        entry: of the optimizer, from :func:`tools.paper.studies.rates.constants`.
        title: of the panel.
    """
    norm, bound = ("1", r"\sqrt{d}\,") if optimizer == "lion" else ("2", "")
    measured = rf"running mean of $\|\nabla f\|_{norm}$"
    axes.loglog(entry["steps"], entry["left"], "o-", color=figures.COLORS[optimizer], markersize=3.5, label=measured)
    label = rf"smallest constant: ${entry['constant']:.3f}\,{bound}K^{{-1/4}}$"
    axes.loglog(entry["steps"], entry["right"], "--", color="black", label=label)
    axes.set(xlabel="K, steps", ylabel=measured, title=title)
    ticks = [step for step in entry["steps"] if math.log2(step / entry["steps"][0]).is_integer()]
    axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)


def draw(found: dict[str, Any], folder: Path) -> Path:
    """Figure A3, a panel for each optimizer."""
    figure, panels = figures.pyplot().subplots(1, len(found), figsize=(4.6 * len(found), 3.7), squeeze=False)
    for axes, (name, entry) in zip(panels[0], found.items(), strict=True):
        panel(axes, name, entry, f"{figures.NAMES[name]}, mean of {entry['repeats']} runs")
    return figures.save(figure, folder / "A3.svg")


def markdown(result: dict[str, Any]) -> str:
    """Both constants beside the paper's, and the perplexities."""
    lines = ["| | constant | in the l2 norm | decided at step | repeats | rate | d | rounds that converged |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, entry in result["rates"].items():
        cells = [f"{entry['constant']:.4f}", f"{entry['l2_constant']:.4f}", entry["at_step"]]
        cells += [entry["repeats"], rates.rate_of(entry), f"{entry['d']:,}", rates.trusted(entry)]
        lines.append(f"| c_{name.upper()} | {' | '.join(map(str, cells))} |")
    lines += ["", "The paper, ResNet18 on CIFAR-100: c_LION = 0.701, c_SGD = 1.365."]
    if found := result.get("perplexity"):
        lines += ["", "| ln perplexity | step | mean | of each seed |", "|---|---|---|---|"]
        for name in rates.NORMS:
            for step, each in zip(found["steps"], zip(*found[name], strict=True), strict=True):
                cells = f"{step} | {statistics.mean(each):.3f} | {' '.join(f'{value:.3f}' for value in each)}"
                lines.append(f"| {figures.NAMES[name]} | {cells} |")
        first = f"Lion's first is below SGD's last in {found['lion_lower']} of {found['seeds']} seeds"
        lines += ["", f"{first}; Lion is below it {rates.below_from(found)}."]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The command line. Raises LionError for what does not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for runs, the figure and the results")
    add("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text to train on (default: Python's documentation)")
    add("--evaluate", type=Path, metavar="FILE", help="text of the perplexities, WikiText's test tokens for example")
    add("--run", type=named_run, action="append", default=[], metavar="OPTIMIZER=JSONL", help="rounds; repeatable")
    add(
        "--model",
        default="tiny GPT",
        metavar="NAME",
        help="what made the rounds of --run, for the report (default: %(default)s)",
    )
    add("--seeds", type=int, default=5, metavar="N", help="repeats of each optimizer (default: %(default)s)")
    add("--iterations", type=int, default=200, metavar="N", help="steps of each run (default: %(default)s)")
    add("--rounds", type=int, default=10, metavar="N", help="rounds and checkpoints of each run (default: %(default)s)")
    add("--batches", type=int, default=16, metavar="N", help="batches of a round (default: %(default)s)")
    sgd, lion = LEARNING_RATES["sgd"], LEARNING_RATES["lion"]
    add("--sgd-lr", type=float, default=sgd, metavar="X", help=f"SGD's rate; Lion's is {lion:g} (default: %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="threads of a run (default: %(default)s)")
    options = parser.parse_args()
    if not options.sgd_lr > 0:
        raise LionError(f"--sgd-lr {options.sgd_lr:g}: a learning rate is above zero")
    if options.run and (options.text or options.evaluate):
        raise LionError("--run takes rounds that are there, --text and --evaluate train: give one or the other")
    options.text = options.text or []
    return options


def by_optimizer(entries: list[tuple[str, Path]]) -> dict[str, list[Path]]:
    """The files of --run by optimizer."""
    files: dict[str, list[Path]] = {}
    for name, path in entries:
        if name not in rates.NORMS:
            raise LionError(f"--run {name}={path}: {name!r} has no rate here. {did_you_mean(name, rates.NORMS)}")
        files.setdefault(name, []).append(path)
    return files


def main() -> None:
    """Train or read, estimate, draw and write."""
    options = parse()
    command = shlex.join(["python", "-m", "tools.paper.rate_constants", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "model": options.model}
    if options.run:
        files = by_optimizer(options.run)
    else:
        runs = study_runs(options, texts.gpt(options.output / "text", options.text))
        run_all(runs, options.threads)
        files = by_optimizer([(run.folder.name.partition("-")[0], run.folder / "norm_ratio.jsonl") for run in runs])
        if options.evaluate:
            scored = evaluations(options)
            run_all(scored, options.threads)
            result["perplexity"] = perplexities(scored, evaluated_steps(options))
    repeats = {name: rates.read_repeats(name, paths) for name, paths in files.items()}
    for name, lr in learning_rates(options).items():
        repeats[name]["lr"] = lr
    result["rates"] = rates.constants(repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "rates.json", result)
    text = markdown(result)
    (options.output / "rates.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"figure: {draw(result['rates'], options.output)}")


if __name__ == "__main__":
    with readable_errors():
        main()
