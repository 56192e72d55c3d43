"""The picture of r against d: a panel for each step and set of parameters, with the fits."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tools.paper.reporting import drawings
from tools.paper.studies import figures

if TYPE_CHECKING:
    from tools.paper.reporting.size_findings import Arm, Key, Points

COLORS = drawings.LONG_COLORS | {"start": figures.COLORS["start"]}


def draw(found: "Mapping[Key, Points]", sets: Sequence[str]) -> str:
    """r against d of each of ``sets`` (rows) and at each step (columns), both axes logarithmic, as SVG text.

    Of an optimizer with two rates the lower has open marks.
    """
    steps = sorted({step for _, step, _ in found})
    size = (3.4 * len(steps), 3.1 * len(sets))
    highest = {arm.optimizer: arm for arm in sorted({arm for arm, _, _ in found})}
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
                    _draw_one(axes, points, arm, fill="full" if arm == highest[arm.optimizer] else "none")
            if axes.has_data():
                axes.legend(fontsize=7)
    return figures.svg(figure)


def _draw_one(axes: Any, points: "Points", arm: "Arm", fill: str) -> None:
    """Points, their fit, and sqrt(d) through the fit's middle as a dotted line."""
    color = COLORS[arm.optimizer]
    axes.plot(points.d, points.r, "o", color=color, markersize=4, fillstyle=fill, label=arm.name)
    if fit := points.fit:
        ends = [min(points.d), max(points.d)]
        axes.plot(ends, [fit.coefficient * d**fit.exponent for d in ends], "-", color=color, linewidth=1.0)
        middle = (ends[0] * ends[1]) ** 0.5
        level = fit.coefficient * middle**fit.exponent
        axes.plot(ends, [level * (d / middle) ** 0.5 for d in ends], ":", color=color, linewidth=0.8)
