"""The picture of r against d: a panel for each step and set of parameters, with the fits."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.paper.reporting import drawings
from tools.paper.reporting.size_points import Arm, Key, Points
from tools.paper.studies import figures

COLORS = drawings.LONG_COLORS | {"start": figures.COLORS["start"]}
MARKERS = {"start": "o", "lion_paper": "o", "sgd_paper": "s", "sgd_paper_no_momentum": "D", "adamw": "^"}
SIZE = {"markersize": 4.5, "linewidth": 1.0}
MARKS: list[drawings.Mark] = [
    ("mark: one run", {"marker": "o"} | SIZE),
    (rf"dotted: {drawings.ROOT} through the middle of the fit", {"linestyle": ":"}),
    ("solid or dashed: fit through the geometric mean of the runs of each size", {"linestyle": "-"}),
]


def draw(found: Mapping[Key, Points], sets: Sequence[str]) -> str:
    """r against d of each of ``sets`` (rows) and at each step (columns), both axes logarithmic, as SVG text.

    Of an optimizer with two rates the lower has open marks and a dashed fit.
    """
    steps = sorted({step for _, step, _ in found})
    size = (3.4 * len(steps), 3.8 * len(sets) + 0.8)
    looks = _looks(list(dict.fromkeys(arm for arm, _, _ in found)))
    shared: dict[str, Any] = {"squeeze": False, "sharex": "row", "sharey": "row"}
    figure, panels = figures.pyplot().subplots(len(sets), len(steps), figsize=size, **shared)
    for row, name in zip(panels, sets, strict=True):
        for axes, step in zip(row, steps, strict=True):
            axes.set(xscale="log", yscale="log", xlabel="d", ylabel="r")
            axes.set_title(f"{name}, step {step:,}", fontsize=9)
            axes.tick_params(axis="x", which="minor", labelbottom=False)
            axes.grid(alpha=0.3, which="both", linewidth=0.5)
            for (arm, at, of), points in found.items():
                if (at, of) == (step, name):
                    _draw_one(axes, points, looks[arm])
    drawings.legend(figure, [(arm.name, look) for arm, look in looks.items()], MARKS)
    return figures.svg(figure)


def _looks(arms: Sequence[Arm]) -> dict[Arm, dict[str, Any]]:
    """How the marks and the fit of each arm are drawn."""
    highest = {arm.optimizer: arm for arm in sorted(arms)}
    # A white edge sets a mark apart from one below it. Open marks are above the others, which would hide them.
    filled = SIZE | {"linestyle": "-", "markeredgecolor": "white", "markeredgewidth": 0.4}
    hollow = SIZE | {"linestyle": "--", "fillstyle": "none", "markeredgewidth": 0.8, "zorder": 3}
    return {
        arm: (filled if arm == highest[arm.optimizer] else hollow)
        | {"color": COLORS[arm.optimizer], "marker": MARKERS[arm.optimizer]}
        for arm in arms
    }


def _draw_one(axes: Any, points: Points, look: dict[str, Any]) -> None:
    """Points, their fit, and sqrt(d) through the fit's middle as a dotted line."""
    axes.plot(points.d, points.r, **(look | {"linestyle": ""}))
    if fit := points.fit:
        ends = [min(points.d), max(points.d)]
        axes.plot(ends, [fit.coefficient * d**fit.exponent for d in ends], **(look | {"marker": ""}))
        middle = (ends[0] * ends[1]) ** 0.5
        level = fit.coefficient * middle**fit.exponent
        axes.plot(ends, [level * (d / middle) ** 0.5 for d in ends], ":", color=look["color"], linewidth=0.8)
