"""The pictures that the report draws: what is drawn where, and what the legends say of it."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.tools.test_report_pages import record
from tools.paper.reporting import drawings, size_drawing, size_points
from tools.paper.reporting.size_points import Arm, Points
from tools.paper.studies import figures, rates


@pytest.fixture
def figure_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The figure that a drawing makes, instead of its SVG text."""
    monkeypatch.setattr(figures, "svg", lambda figure: figure)
    return lambda draw, *arguments: draw(*arguments)


def words_of(figure: Any) -> list[str]:
    """The words of the legends around the panels."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


GROUPS = {
    name: [record(name, seed, 6.0 + seed, validation_loss={"5": 5.0 + seed}) for seed in (1, 2)]
    for name in ("lion_paper", "sgd_paper")
}
WORDS = {"lion_paper": "LION", "sgd_paper": "SGD, momentum 0.9"}


def test_long_runs_tell_exact_rounds_from_those_that_did_not_converge(figure_of: Callable[..., Any]) -> None:
    figure = figure_of(drawings.long_runs, GROUPS, WORDS)
    loss, ratio = figure.axes
    of_lion = [line for line in ratio.lines if line.get_color() == drawings.LONG_COLORS["lion_paper"]]
    exact = [line for line in of_lion if line.get_marker() == "D"]
    assert [list(line.get_ydata()) for line in exact] == [[7.5 / 4] * 2] and exact[0].get_alpha() == 1.0
    open_marks = [line for line in of_lion if line.get_marker() == "o"]
    assert len(open_marks) == 2 and all(list(line.get_xdata()) == [1, 2, 3, 4] for line in open_marks)
    assert all(line.get_fillstyle() == "none" and line.get_alpha() < 0.5 for line in open_marks)
    assert [list(line.get_xdata()) for line in of_lion if line.get_marker() == "."] == [[5], [5]]
    diamonds = [line for line in loss.lines if line.get_marker() == "D"]
    assert [list(line.get_ydata()) for line in diamonds] == [[4.5, 4.5]] * 2
    assert [list(line.get_ydata()) for line in loss.lines if line.get_marker() == "s"] == [[6.5]] * 2
    assert {"LION", "SGD, momentum 0.9", "left: validation loss"} <= set(words_of(figure))


def test_losses_of_optimizers_are_side_by_side(figure_of: Callable[..., Any]) -> None:
    loss = figure_of(drawings.long_runs, GROUPS, WORDS).axes[0]
    for mark, steps in (("s", [5]), ("D", [0, 5])):
        of_lion, of_sgd = (list(line.get_xdata()) for line in loss.lines if line.get_marker() == mark)
        middles = [(left + right) / 2 for left, right in zip(of_lion, of_sgd, strict=True)]
        assert middles == pytest.approx(steps) and of_sgd[0] - of_lion[0] == pytest.approx(5 * drawings.MARK_SPACE)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_legend_is_about_seeds_where_there_are_several(figure_of: Callable[..., Any], seeds: int) -> None:
    words = words_of(figure_of(drawings.long_runs, {"lion_paper": GROUPS["lion_paper"][:seeds]}, WORDS))
    about = [one for one in words if "seeds" in one or "bands" in one]
    assert about == ["lines, squares, diamonds: mean of the seeds; bands: smallest to largest"] * (seeds > 1)


def test_a_round_that_is_not_finite_leaves_a_gap(figure_of: Callable[..., Any]) -> None:
    one = record("sgd_paper", 1, 6.0)
    one["rounds"]["l1"][2] = None
    ratio = figure_of(drawings.long_runs, {"sgd_paper": [one]}, WORDS).axes[1]
    drawn = next(line for line in ratio.lines if len(line.get_xdata()) == 5)
    assert [math.isfinite(value) for value in drawn.get_ydata()] == [True, True, False, True, True]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The constants of ``GROUPS``."""
    repeats = {
        name: {
            "steps": [1, 2, 3, 4, 5],
            "d": 400,
            "norms": [one["rounds"][rates.NORMS[name]] for one in GROUPS[f"{name}_paper"]],
            "l2_norms": [one["rounds"]["l2"] for one in GROUPS[f"{name}_paper"]],
        }
        for name in ("lion", "sgd")
    }
    return rates.constants(repeats)


def test_constants_are_drawn_with_a_band_over_the_seeds(figure_of: Callable[..., Any], found: dict[str, Any]) -> None:
    lion, sgd = figure_of(drawings.constants, GROUPS, WORDS, found).axes
    assert lion.get_title() == "(a) LION, mean of 2 runs" and sgd.get_title() == "(b) SGD, momentum 0.9, mean of 2 runs"
    assert [list(line.get_ydata()) for line in lion.lines] == [found["lion"]["left"], found["lion"]["right"]]
    heights = lion.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (7.0, 8.0), "running means of the two seeds' l1 norms"
    plain = figure_of(drawings.constants, {}, WORDS, found).axes[0]
    assert not plain.collections and len(plain.lines) == 2


def test_constants_name_the_norm_and_their_legend_is_below_the_panel(
    figure_of: Callable[..., Any], found: dict[str, Any]
) -> None:
    figure = figure_of(drawings.constants, GROUPS, WORDS, found)
    figure.canvas.draw()
    for axes, norm in zip(figure.axes, "12", strict=True):
        assert axes.get_ylabel() == rf"running mean of $\|\nabla f\|_{norm}$"
        assert axes.get_legend().get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0


def test_an_optimizers_lower_rate_is_open_and_dashed(figure_of: Callable[..., Any]) -> None:
    """Two seeds a size; r of the lower rate is d."""
    sizes = [10, 10, 100, 100, 1000, 1000]
    found = {
        (Arm("lion_paper", rate), 5, size_points.WHOLE): Points(
            d=sizes, r=[d**exponent for d in sizes], seeds=[1] * len(sizes)
        )
        for rate, exponent in ((1e-3, 0.5), (1e-4, 1.0))
    }
    figure = figure_of(size_drawing.draw, found, (size_points.WHOLE,))
    high, fit, _, low, low_fit, root = figure.axes[0].lines
    assert (high.get_fillstyle(), low.get_fillstyle()) == ("full", "none") and len(low.get_xdata()) == 6
    assert (fit.get_linestyle(), low_fit.get_linestyle(), root.get_linestyle()) == ("-", "--", ":")
    assert list(low_fit.get_ydata()) == pytest.approx([10.0, 1000.0])
    assert list(root.get_ydata()) == pytest.approx([10.0**1.5, 10.0**2.5]), "through (100, 100)"
    assert words_of(figure) == [
        *("LION at 0.001", "LION at 0.0001", "mark: one run"),
        r"dotted: $\sqrt{d}$ through the middle of the fit",
        "solid or dashed: fit through the geometric mean of the runs of each size",
    ]
    assert figure.axes[0].get_legend() is None


def test_pictures_of_epochs_say_lion_as_the_report_does(figure_of: Callable[..., Any]) -> None:
    row = {"model": "resnet18", "optimizer": "lion", "epoch": 1, "loss": 2.0, "top1": 0.5, "d": 400}
    figure = figure_of(drawings.epochs, {"resnet18-lion": [row | {"ratio_over_sqrt_d": 0.5}]})
    assert words_of(figure)[0] == "LION"
