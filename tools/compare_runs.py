"""Draw the loss of one or more Megatron runs, and write their table, from their logs.

python tools/compare_runs.py --run Lion=runs/demo/lion/log.txt --run SGD=runs/demo/sgd/log.txt --figure loss.png
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from megatron_lion.training_log import TrainingLog, read_training_log

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")


def named_run(value: str) -> tuple[str, Path]:
    """Split ``NAME=LOG``."""
    name, separator, path = value.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=LOG, for example Lion=runs/demo/lion/log.txt")
    return name, Path(path)


def runs_by_name(named: list[tuple[str, Path]]) -> dict[str, Path]:
    """The path of each named ``--run``. Raises LionError if two runs have the same name."""
    runs = dict(named)
    if len(runs) < len(named):
        raise LionError("two runs have the same name; give each its own")
    return runs


def figure_path(value: str) -> Path:
    """A path with a suffix that names the format to draw."""
    path = Path(value)
    if path.suffix not in FIGURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{value!r} ends in none of {', '.join(FIGURE_SUFFIXES)}")
    return path


def draw(runs: dict[str, TrainingLog], path: Path) -> None:
    """Training loss as lines and validation loss as points, one color for each run; the format follows the suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    plot_losses(axes, runs)
    axes.set_xlabel("iteration")
    axes.set_title("Pretraining loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_losses(axes: Any, runs: dict[str, TrainingLog]) -> None:
    """Each run's training loss as a line of matplotlib's next color, and its validation loss as points of it."""
    for name, log in runs.items():
        iterations = sorted(log.loss)
        (line,) = axes.plot(iterations, [log.loss[i] for i in iterations], label=f"{name}, training", linewidth=1.2)
        if log.validation:
            points = sorted(log.validation)
            axes.plot(
                points, [log.validation[i] for i in points], "o", color=line.get_color(), label=f"{name}, validation"
            )
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def table(runs: dict[str, TrainingLog]) -> str:
    """A Markdown table, one row for each run."""
    rows = [
        "| run | iterations | last loss | validation loss | test loss | test perplexity | median ms/iteration |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, log in runs.items():
        test = log.final.get("test")
        cells = [
            name,
            f"{max(log.loss)} of {log.iterations}",
            _number(log.loss[max(log.loss)]),
            _number(log.final.get("validation")),
            _number(test),
            f"{math.exp(test):.1f}" if test is not None else "-",
            f"{statistics.median(log.milliseconds.values()):.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main() -> None:
    """Read the logs, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=named_run, action="append", required=True, metavar="NAME=LOG", help="repeatable")
    parser.add_argument("--figure", type=figure_path, help="picture to write (.png, .svg or .pdf)")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    runs = {name: read_training_log(path) for name, path in runs_by_name(options.run).items()}
    text = table(runs)
    print(text)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(text, encoding="utf-8")
        print(f"table:  {options.table}")
    if options.figure:
        draw(runs, options.figure)
        print(f"figure: {options.figure}")


if __name__ == "__main__":
    with readable_errors():
        main()
