"""The figures and the table of tools/paper/toy_convergence.py: drawing and wording, no arithmetic of the experiment."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

CASES = {"constrained": ("(9)", "A2a_constrained"), "unconstrained": ("(13)", "A2b_unconstrained")}
LEFT, RIGHT = "#1f5fa8", "#c0392b"


def draw(
    result: dict[str, Any], value: Callable[[torch.Tensor], torch.Tensor], folder: Path, suffix: str
) -> list[Path]:
    """Write the paper's figures A1 (a), (b) and A2 (a), (b), and one of the corollary's runs; returns their paths.

    Args:
        result: what the tool measured.
        value: f, [..., 2] -> [...].
        folder: where to.
        suffix: ``svg`` or ``pdf``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same result gives the same bytes.
    plt.rcParams.update({"svg.hashsalt": "toy", "figure.constrained_layout.use": True, "font.size": 10})
    figures = {"A1a_surface": _surface(plt, value), "A1b_contours": _contours(plt, value, result["minimum"][0])}
    for name, (equation, file) in CASES.items():
        figures[file] = _curves(plt, result[name]["paper"], name, equation)
    figures["corollary"] = _corollary(plt, result)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.{suffix}")
        figure.savefig(paths[-1], metadata={"Date": None} if suffix == "svg" else {"CreationDate": None})
        plt.close(figure)
    return paths


def _plane(value: Callable[[torch.Tensor], torch.Tensor], reach: float, points: int) -> tuple[Any, Any, Any]:
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    return x.numpy(), y.numpy(), value(torch.stack((x, y), dim=-1)).numpy()


def _surface(plt: Any, value: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    figure = plt.figure(figsize=(5.2, 4.2))
    axes = figure.add_subplot(projection="3d")
    axes.plot_surface(*_plane(value, 5.0, 41), rcount=41, ccount=41, cmap="viridis", linewidth=0.2, edgecolor="white")
    axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", title=r"$f(\theta)$")
    axes.view_init(elev=32, azim=-55)
    axes.set_box_aspect(None, zoom=1.08)
    return figure


def _contours(plt: Any, value: Callable[[torch.Tensor], torch.Tensor], minimum: float) -> Any:
    figure, axes = plt.subplots(figsize=(4.8, 4.2))
    drawn = axes.contour(*_plane(value, 5.0, 201), levels=18, cmap="viridis", linewidths=0.9)
    figure.colorbar(drawn, ax=axes, label=r"$f(\theta)$")
    axes.plot([0, 0, minimum, -minimum], [minimum, -minimum, 0, 0], "*", color=RIGHT, markersize=9, label="minima")
    axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", aspect="equal")
    axes.legend(loc="upper right")
    return figure


def _curves(plt: Any, paper: dict[str, Any], name: str, equation: str) -> Any:
    figure, axes = plt.subplots(figsize=(5.2, 4.0))
    steps = range(1, len(paper["left"]) + 1)
    axes.loglog(steps, paper["left"], color=LEFT, label=f"left side of {equation}, mean over the starts")
    if widths := paper["left_half_width"]:
        low, high = ([one + sign * width for one, width in zip(paper["left"], widths, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=LEFT, alpha=0.2, linewidth=0, label="its 95 % interval")
    axes.loglog(steps, paper["right"], "--", color=RIGHT, label=f"right side of {equation}")
    axes.set(
        xlabel="k",
        ylabel="mean over the steps up to k",
        title=rf"{name}, $\eta$ = 0.01, $\lambda$ = {paper['weight_decay']:g}, betas (0.9, 0.99)",
    )
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend()
    return figure


def _corollary(plt: Any, result: dict[str, Any]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.9))
    for axes, (name, (equation, _)) in zip(panels, CASES.items(), strict=True):
        found = result[name]["corollary"]
        steps = [row["steps"] for row in found["rows"]]
        left, widths = [row["left"] for row in found["rows"]], [row["left_half_width"] or 0.0 for row in found["rows"]]
        label = f"left side of {equation}, 95 % interval of the mean"
        axes.errorbar(steps, left, widths, fmt="o-", color=LEFT, capsize=3, label=label)
        axes.plot(steps, [row["right"] for row in found["rows"]], "s--", color=RIGHT, label="right side")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="K",
            ylabel="mean over the K steps",
            title=f"{name}: slope {found['slope']:.4f}",
        )
        axes.set_xticks(steps, [f"{step:,}" for step in steps], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.legend()
    return figure


def markdown(result: dict[str, Any], shown: Sequence[int]) -> str:
    """The whole result as text; ``shown`` are the steps of the first table."""
    minimum, lowest = result["minimum"]
    lines = [f"`{result['command']}` ({result['seconds']} s)", ""]
    lines += [f"Minima at (0, ±{minimum:.6f}) and (±{minimum:.6f}, 0), f* = {lowest:.6f}.", ""]
    for name, (equation, _) in CASES.items():
        paper = result[name]["paper"]
        lines += [f"### {name}: the paper's settings (η = 0.01, λ = {paper['weight_decay']:g}, betas 0.9, 0.99)", ""]
        lines += _table(
            ("k", f"left of {equation}", f"right of {equation}", "left / right", "95 % interval of left / right"),
            (
                (k, f"{left:.3f}", f"{right:.3f}", f"{left / right:.3f}", _interval(paper, k))
                for k in shown
                for left, right in [(paper["left"][k - 1], paper["right"][k - 1])]
            ),
        )
        lines += [f"Averaged: {_sentence(paper['averaged'])}. Largest |θ_k|: {paper['largest_iterate']:.4g}.", ""]
        by_start = zip(paper["gaps"], paper["by_start"], strict=True)
        lines += [f"- start with D = {gap:.1f}: {_sentence(excess)}" for gap, excess in by_start]
        lines += [f"- start in the corner (10, 10): {_sentence(paper['corner'])}", ""]
        found = result[name]["corollary"]
        lines += [f"### {name}: the corollary's own betas and η", ""]
        lines += _table(
            ("K", f"left of {equation}", f"right of {equation}", "left / right", "largest over the starts"),
            (
                (
                    f"{row['steps']:,}",
                    f"{row['left']:.4f}",
                    f"{row['right']:.3f}",
                    f"{row['left'] / row['right']:.4f}",
                    f"{row['largest_share']:.4f}",
                )
                for row in found["rows"]
            ),
        )
        interval = f"[{found['slope_low']:.4f}, {found['slope_high']:.4f}], too narrow: all K have the same starts"
        lines += [f"Slope of log left against log K: {found['slope']:.4f}, 95 % interval {interval}.", ""]
        lines += [f"### {name}: other η and λ, K = {len(paper['left'])}", ""]
        lines += _table(
            ("η", "λ", "largest left / right", "at k", "above 1 for k", "at the end"),
            map(_grid_row, result[name]["grid"]),
        )
    return "\n".join(lines)


def _interval(paper: dict[str, Any], k: int) -> str:
    """Of left / right at step ``k``, over the starts."""
    if not paper["left_half_width"]:
        return "one start"
    left, width, right = (paper[key][k - 1] for key in ("left", "left_half_width", "right"))
    return f"{(left - width) / right:.3f} to {(left + width) / right:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, row))} |" for row in cells] + [""]


def _grid_row(row: dict[str, Any]) -> list[str]:
    over = "never" if row["over_from"] is None else f"{row['over_from']} to {row['over_to']}"
    return [
        f"{row['lr']:g}",
        f"{row['weight_decay']:g}",
        f"{row['largest']:.3f}",
        str(row["at"]),
        over,
        f"{row['at_the_end']:.3f}",
    ]


def _sentence(excess: dict[str, Any]) -> str:
    over = (
        "never above the right side"
        if excess["over_from"] is None
        else f"above the right side for k = {excess['over_from']} to {excess['over_to']}"
    )
    return (
        f"left / right is at most {excess['largest']:.3f} (k = {excess['at']}), {over}, and ends at "
        f"{excess['at_the_end']:.3f}"
    )
