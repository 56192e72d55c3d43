"""Pictures that the report draws itself, as SVG text, in the paper's layout: losses on the left, r on the right.

A legend below each picture says in words what every mark is.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_lion.training_log import TrainingLog
from tools.paper import rate_constants, theory
from tools.paper.studies import figures
from tools.paper.studies.rates import NORMS

LONG_COLORS = {
    **{"lion_paper": figures.COLORS["lion"], "sgd_paper": figures.COLORS["sgd"]},
    **{"sgd_paper_no_momentum": "#d98b1f", "adamw": figures.COLORS["adam"]},
}
# A diamond fits into a square: both losses of a step are often the same.
VALIDATION = {"marker": "s", "markersize": 5.5, "fillstyle": "none", "markeredgewidth": 1.0}
EXACT = {"marker": "D", "markersize": 3.0}
MARK_SPACE = 0.027  # distance of two optimizers' marks of the same step, as a share of the run's steps
WIDTH = 9.2  # inches
RATIO = r"$r = \|\nabla f\|_1 \,/\, \|\nabla f\|_2$"
ROOT = r"$\sqrt{d}$"
Records = list[dict[str, Any]]
Mark = tuple[str, dict[str, Any]]  # words, and how it looks


def legend(figure: Any, named: Sequence[Mark], marks: Sequence[Mark]) -> None:
    """A row of names above the panels. Below them the marks, gray unless their look has a color."""
    figure.legend(handles=_handles(named), loc="outside upper center", ncols=len(named), frameon=False)
    figure.legend(handles=_handles(marks), loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)


def _handles(marks: Sequence[Mark]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], **({"color": "#555555", "linestyle": ""} | look), label=words) for words, look in marks]


def _colored(colors: Mapping[str, str]) -> list[Mark]:
    return [(name, {"color": color, "linestyle": "-", "linewidth": 3}) for name, color in colors.items()]


def _finish(loss: Any, ratio: Any, d: int, xlabel: str) -> None:
    """The axes' names, and the largest value that r can have."""
    ratio.axhline(d**0.5, color="black", linewidth=0.8)
    ratio.annotate(ROOT, (1.0, d**0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    loss.set(xlabel=xlabel, ylabel="loss (nats)")
    ratio.set(xlabel=xlabel, ylabel=RATIO, ylim=(0, 1.12 * d**0.5))
    for axes in (loss, ratio):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:,.0f}")


def loss_and_ratio(logs: dict[str, TrainingLog], rounds: dict[str, Records]) -> str:
    """Training loss and that of the test set on the left, r on the right (open: not converged)."""
    figure, (loss, ratio) = figures.pyplot().subplots(1, 2, figsize=(WIDTH, 4.2))
    for name, log in logs.items():
        color = {"color": figures.COLORS.get(name)}
        steps = sorted(log.loss)
        loss.plot(steps, [log.loss[step] for step in steps], **color)
        if log.validation:
            tested = sorted(log.validation)
            loss.plot(tested, [log.validation[step] for step in tested], "s", markersize=4, **color)
        records = [record for record in rounds[name] if record["ratio"] is not None]
        at = [record["iteration"] for record in records]
        ratio.plot(at, [record["ratio"] for record in records], linewidth=1.0, **color)
        for record in records:
            face = color["color"] if record["converged"] else "white"
            ratio.plot(record["iteration"], record["ratio"], "o", markerfacecolor=face, **color)
    _finish(loss, ratio, next(iter(rounds.values()))[0]["d"], "step")
    marks = [
        ("left: training loss", {"linestyle": "-"}),
        ("right: round that converged", {"marker": "o"}),
        ("left: validation loss", {"marker": "s", "markersize": 4}),
        ("right: round that did not converge (noise in r)", {"marker": "o", "markerfacecolor": "white"}),
    ]
    colors = {figures.NAMES.get(name, name): figures.COLORS.get(name, "C0") for name in logs}
    legend(figure, _colored(colors), marks)
    return figures.svg(figure)


def epochs(runs: dict[str, Records]) -> str:
    """A row for each model: training loss and top-1 accuracy on the left, r on the right, over epochs."""
    models = list(dict.fromkeys(rows[0]["model"] for rows in runs.values()))
    size = (WIDTH, 3.6 * len(models) + 0.7)
    figure, panels = figures.pyplot().subplots(len(models), 2, figsize=size, squeeze=False)
    colors = {}
    for (loss, ratio), model in zip(panels, models, strict=True):
        accuracy = loss.twinx()
        accuracy.set(ylabel="top-1 accuracy", ylim=(0, 1))
        of_model = [rows for rows in runs.values() if rows[0]["model"] == model]
        for rows in of_model:
            optimizer, at = rows[0]["optimizer"], [row["epoch"] for row in rows]
            color = colors[figures.NAMES.get(optimizer, optimizer)] = figures.COLORS.get(optimizer, "C0")
            loss.plot(at, [row["loss"] for row in rows], color=color)
            accuracy.plot(at, [row["top1"] for row in rows], "--", color=color)
            ratio.plot(at, [_ratio(row) for row in rows], "D-", markersize=3, linewidth=1.0, color=color)
        _finish(loss, ratio, of_model[0][0]["d"], "epoch")
        loss.set(title=model)
    marks = [
        ("left: loss over the whole training set", {"linestyle": "-"}),
        ("right: exact gradient over the whole training set", {"marker": "D", "markersize": 3, "linestyle": "-"}),
        ("left: top-1 accuracy on the test set (right scale)", {"linestyle": "--"}),
        ("right: the largest value that r can have", {"linestyle": "-", "color": "black", "linewidth": 0.8}),
    ]
    legend(figure, _colored(colors), marks)
    return figures.svg(figure)


def _ratio(epoch: dict[str, Any]) -> float:
    return float(epoch["ratio_over_sqrt_d"] * epoch["d"] ** 0.5)


def long_runs(groups: dict[str, Records], names: dict[str, str]) -> str:
    """Figure 2 or 3: losses on the left, r on the right, a line and a band over the seeds of each optimizer.

    Exact rounds are diamonds, on the right on a strong line. Rounds of some batches are faint in comparison: dots where
    they converged, open circles where they did not. On the left the optimizers' marks of a step are side by side,
    because their losses can be closer than a mark is high.

    Args:
        groups: records of ``tools.paper.studies.long_records`` by optimizer, one for each seed.
        names: what the legend calls an optimizer.
    """
    figure, (loss, ratio) = figures.pyplot().subplots(1, 2, figsize=(WIDTH, 4.9))
    for index, (name, records) in enumerate(groups.items()):
        look = {"color": LONG_COLORS[name]}
        _band(loss, [_points(one["training_loss"]) for one in records], look, alpha=0.7, linewidth=1.0)
        shift = (index - (len(groups) - 1) / 2) * MARK_SPACE * records[0]["steps"]
        _loss_marks(loss, records, look, shift)
        _band(ratio, [_exact(one, "ratio") for one in records], look, linewidth=1.6, **EXACT)
        _rounds(ratio, [one["rounds"] for one in records], look["color"])
    _finish(loss, ratio, next(iter(groups.values()))[0]["d"], "step")
    marks = _long_marks(has_seeds=any(len(records) > 1 for records in groups.values()))
    legend(figure, _colored({names[name]: LONG_COLORS[name] for name in groups}), marks)
    return figures.svg(figure)


def _loss_marks(axes: Any, records: Records, look: dict[str, Any], shift: float) -> None:
    """The seeds' mean validation and exact losses, drawn ``shift`` steps to the right."""
    validation, exact = [_points(one["validation_loss"]) for one in records], [_exact(one, "loss") for one in records]
    for mark, seeds in ((VALIDATION, validation), (EXACT, exact)):
        means = [statistics.fmean(seed[step] for seed in seeds) for step in seeds[0]]
        axes.plot([step + shift for step in seeds[0]], means, linestyle="", **mark, **look)


def _long_marks(has_seeds: bool) -> list[Mark]:
    """The legend's lower part for :func:`long_runs`."""
    faint = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.5}
    of_seeds = "lines, squares, diamonds: mean of the seeds; bands: smallest to largest"
    return [
        ("left: training loss, mean of each 1,000 steps", {"linestyle": "-", "linewidth": 1.0, "alpha": 0.7}),
        ("left: validation loss", VALIDATION),
        ("left: loss, right: r of the exact gradient, over the fixed split", EXACT),
        ("left: squares and diamonds of the same step are side by side", {}),
        ("right: round of some batches that converged", {"marker": ".", "markersize": 3} | faint),
        (
            "right: round that did not converge (noise in r)",
            {"marker": "o", "markersize": 3, "fillstyle": "none"} | faint,
        ),
        *([(of_seeds, {"linestyle": "-", "linewidth": 7, "alpha": 0.2})] if has_seeds else []),
    ]


def _points(by_step: dict[str, float]) -> dict[int, float]:
    return {int(step): value for step, value in by_step.items()}


def _exact(record: dict[str, Any], key: str) -> dict[int, float]:
    return {int(step): entry[key] for step, entry in record["exact"].items()}


def _rounds(axes: Any, seeds: list[dict[str, list[Any]]], color: str) -> None:
    """r of the rounds of some batches, faint: the mean and band of the seeds, and a mark for each."""
    found = [
        dict(zip(rounds["iteration"], map(_quotient, rounds["l1"], rounds["l2"]), strict=True)) for rounds in seeds
    ]
    _band(axes, found, {"color": color}, alpha=0.35, shade=0.1, linewidth=0.7)
    for ratios, rounds in zip(found, seeds, strict=True):
        marks = list(zip(ratios.items(), rounds["converged"], strict=True))
        for converged, mark in ((True, {"marker": "."}), (False, {"marker": "o", "fillstyle": "none"})):
            chosen = [point for point, mark_of in marks if bool(mark_of) == converged]
            look = {"linestyle": "", "markersize": 3, "markeredgewidth": 0.5, "alpha": 0.35} | mark
            axes.plot([step for step, _ in chosen], [ratio for _, ratio in chosen], color=color, **look)


def _quotient(l1: float | None, l2: float | None) -> float:
    """r; not a number where a norm was not finite, which leaves a gap in the line."""
    return l1 / l2 if l1 is not None and l2 else math.nan


def _band(
    axes: Any, seeds: list[dict[int, float]], look: dict[str, Any], alpha: float = 1.0, shade: float = 0.2, **line: Any
) -> None:
    """A line through the mean of the seeds, and the area between the smallest and the largest."""
    steps = list(seeds[0])
    each = list(zip(*(seed.values() for seed in seeds), strict=True))
    axes.plot(steps, [sum(at) / len(at) for at in each], alpha=alpha, **(look | line))
    low, high = [min(at) for at in each], [max(at) for at in each]
    axes.fill_between(steps, low, high, color=look["color"], alpha=shade, linewidth=0)


def constants(groups: Mapping[str, Records], names: Mapping[str, str], found: Mapping[str, dict[str, Any]]) -> str:
    """Figure A3: (a) the l1 norm with Lion and (b) the l2 norm with SGD against the smallest constant times the rate.

    Args:
        groups: long-run records of ``lion_paper`` and ``sgd_paper``, one for each seed. The band is drawn from them.
            Without records of an optimizer its panel has no band.
        names: what the titles call ``lion_paper`` and ``sgd_paper``.
        found: :func:`tools.paper.studies.rates.constants` of ``lion`` and ``sgd``.
    """
    figure, panels = figures.pyplot().subplots(1, len(found), figsize=(WIDTH, 4.4), squeeze=False)
    for axes, letter, (name, entry) in zip(panels[0], "ab", found.items(), strict=False):
        records = groups.get(f"{name}_paper", [])
        if len(records) > 1:
            norms = torch.tensor([one["rounds"][NORMS[name]] for one in records], dtype=torch.float64)
            means, look = theory.running_mean(norms), {"color": figures.COLORS[name], "alpha": 0.2, "linewidth": 0}
            low, high = means.amin(0).tolist(), means.amax(0).tolist()
            axes.fill_between(entry["steps"], low, high, label="smallest to largest of the seeds", **look)
        count = f"mean of {entry['repeats']} runs" if entry["repeats"] > 1 else "1 run"
        rate_constants.panel(axes, name, entry, f"({letter}) {names[f'{name}_paper']}, {count}")
    return figures.svg(figure)
