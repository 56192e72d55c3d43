"""Draw the norm ratio r = ||g||_1 / ||g||_2 over training, from the norm_ratio.jsonl of one or more runs.

python tools/norm_ratio_figure.py --run Lion=runs/lion/norm_ratio.jsonl --run SGD=runs/sgd/norm_ratio.jsonl \\
    --figure norm_ratio.png

Two lines are references: sqrt(d), the upper bound of r, and sqrt(2 d / pi), the ratio of pure noise. An open circle is
a round with an estimate that has not converged: there r says more about the noise than about the gradient.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from compare_runs import figure_path, named_run, runs_by_name

from megatron_lion.run import readable_errors
from megatron_lion.stats.convergence import GAUSSIAN_RATIO
from megatron_lion.stats.writer import read_records

Record = dict[str, Any]


def draw(runs: dict[str, list[Record]], path: Path) -> None:
    """r, and below it the mean loss of the rounds, over iterations; the format follows the suffix of ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (ratio, loss) = plt.subplots(2, sharex=True, figsize=(7.5, 6.5), layout="constrained", height_ratios=(2, 1))
    plot_ratios(ratio, runs)
    for line, (name, records) in zip(ratio.lines, runs.items(), strict=False):
        loss.plot(*_points(records, "loss"), "o-", markersize=3, color=line.get_color(), label=name, linewidth=1.2)
    loss.set_ylabel("loss of the rounds (nats)")
    loss.set_xlabel("iteration")
    loss.grid(alpha=0.3)
    ratio.set_title("Norm ratio of the mean gradient")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_ratios(axes: Any, runs: dict[str, list[Record]]) -> None:
    """Each run's r, first all runs' lines, then their points; and the two reference lines."""
    lines = [axes.plot(*_points(records, "ratio"), linewidth=1.2)[0] for records in runs.values()]
    for line, (name, records) in zip(lines, runs.items(), strict=True):
        for converged, fill in ((True, line.get_color()), (False, "white")):
            chosen = [record for record in records if bool(record["converged"]) is converged]
            label = name if converged else f"{name}, not converged"
            style = {"color": line.get_color(), "markerfacecolor": fill, "label": label}
            if chosen:
                axes.plot(*_points(chosen, "ratio"), "o", **style)
    sizes = sorted({record["d"] for records in runs.values() for record in records})
    for d in sizes:
        axes.axhline(math.sqrt(d), color="black", linewidth=0.8)
        axes.axhline(GAUSSIAN_RATIO * math.sqrt(d), color="black", linewidth=0.8, linestyle="--")
        axes.annotate(rf"$\sqrt{{d}}$, d = {d:,}", (1, math.sqrt(d)), **ANNOTATION)
        axes.annotate(r"noise alone: $\sqrt{2d/\pi}$", (1, GAUSSIAN_RATIO * math.sqrt(d)), **ANNOTATION)
    axes.set_ylim(0, 1.1 * math.sqrt(max(sizes)))
    axes.set_ylabel(r"$r = \|g\|_1 / \|g\|_2$")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


ANNOTATION: dict[str, Any] = {
    "xycoords": ("axes fraction", "data"),
    "xytext": (-4, 3),
    "textcoords": "offset points",
    "ha": "right",
    "fontsize": 8,
}


def _points(records: list[Record], key: str) -> tuple[list[int], list[float]]:
    """Iterations and values, without rounds that have no such number (NaN is null in the file)."""
    pairs = [(record["iteration"], record[key]) for record in records if record[key] is not None]
    return [iteration for iteration, _ in pairs], [value for _, value in pairs]


def table(runs: dict[str, list[Record]]) -> str:
    """A Markdown table, one row for each round."""
    rows = [
        "| run | iteration | batches | loss | r | r / sqrt(d) | signal to noise | converged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, records in runs.items():
        for record in records:
            numbers = [_number(record[key], digits) for key, digits in (("loss", 4), ("ratio", 2))]
            numbers += [_number(record["ratio_over_sqrt_d"], 4), _number(record["snr"], 2)]
            verdict = {True: "yes", False: "no", None: "-"}[record["converged"]]
            cells = [name, str(record["iteration"]), str(record["batches"]), *numbers, verdict]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Read the files, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=named_run, action="append", required=True, metavar="NAME=JSONL", help="repeatable"
    )
    parser.add_argument("--figure", type=figure_path, required=True, help="picture to write (.png, .svg or .pdf)")
    options = parser.parse_args()
    runs = {name: read_records(path) for name, path in runs_by_name(options.run).items()}
    print(table(runs))
    draw(runs, options.figure)
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    with readable_errors():
        main()
