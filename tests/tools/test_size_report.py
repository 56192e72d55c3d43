"""What the report says of the long runs of several sizes: exponents, their verdicts and the picture."""

from typing import Any

import pytest

from tools.paper import theory
from tools.paper.reporting import size_drawing, size_findings, size_points, study_runs
from tools.paper.reporting.size_points import Arm

Record = dict[str, Any]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture takes most of the time."""
    monkeypatch.setattr("tools.paper.reporting.size_drawing.draw", lambda *_: "<svg></svg>")


def sized(
    width: int,
    *,
    optimizer: str = "lion_paper",
    seed: int = 1,
    exponent: float = 0.5,
    fell: bool = True,
    lr: float = 1e-3,
) -> Record:
    """r = d^exponent of the layers; the embedding's share of l1 falls as it grows."""
    kinds = {"mlp": {"d": 100 * width, "l1": 10.0 * width**exponent, "l2": 1.0}}
    kinds["embedding"] = {"d": 300 * width, "l1": 3.0, "l2": 1.0}
    exact = {step: {"kinds": kinds, "loss": loss} for step, loss in (("0", 7.7), ("1000", 6.0 if fell else 7.65))}
    return {"name": f"width-{width}-{optimizer}-{seed}", "optimizer": optimizer, "seed": seed, "d": 400 * width} | {
        "exact": exact,
        "settings": {"lr": lr},
    }


def sizes_of(records: list[Record]) -> study_runs.StudyRuns:
    return study_runs.StudyRuns(study="sizes", model="gpt", records=records, missing=[], provisional=False)


WIDTHS = (1, 4, 16, 64)


@pytest.mark.usefixtures("no_pictures")
def test_exponents_are_those_of_the_points_with_and_without_the_embedding() -> None:
    records = [sized(width) for width in WIDTHS]
    found = size_points.points(records)
    assert set(found) == {
        (Arm(optimizer), step, name)
        for optimizer, step in (("start", 0), ("lion_paper", 1000))
        for name in (size_points.WHOLE, size_points.WITHOUT, "mlp", "embedding")
    }
    assert found[Arm("start"), 0, size_points.WHOLE].r[0] == pytest.approx(13.0 / 2**0.5)
    finding = size_findings.exponents(sizes_of(records))
    rows = {(row[0], row[2]): row for row in finding.tables[0][1:]}
    assert rows["LION", size_points.WITHOUT][3:] == [
        "4",
        "4",
        "0.500 [0.500, 0.500]",
        "around 0.5",
        "0.50",
        "0.50",
        "1.000 to 1.000",
    ]
    assert rows["LION", size_points.WHOLE][6] == "below 0.5"
    layers = {(row[0], row[2]): row for row in finding.tables[1][1:]}
    assert layers["LION", "embedding"][4].startswith("0.000") and layers["LION", "mlp"][3] == "1.000 to 1.000"
    assert "Step 1,000. All parameters: LION below 0.5. Without the embedding: LION around 0.5." in finding.verdict
    assert "The embedding, of words and positions, is 75 to 75 % of the parameters" in finding.verdict
    assert "Leaving it out changes the exponent by +0.054 to +0.054." in finding.verdict
    assert finding.judgements[1].verdict == "All parameters: LION below 0.5. Without the embedding: LION around 0.5"
    assert finding.judgements[1].numbers.endswith("; without the embedding: LION 0.500 [0.500, 0.500]")


def test_every_run_is_one_point_and_the_start_is_one_for_all_optimizers() -> None:
    records = [sized(4, seed=seed, optimizer=name) for seed in (1, 2) for name in ("lion_paper", "sgd_paper")]
    found = size_points.points(records)
    assert found[Arm("lion_paper"), 1000, size_points.WHOLE].d == [1600, 1600]
    assert found[Arm("start"), 0, size_points.WHOLE].d == [1600, 1600]


@pytest.mark.usefixtures("no_pictures")
def test_a_fit_is_through_the_mean_of_the_seeds_at_each_size() -> None:
    """The interval of two equal seeds is that of one: a second seed adds no size."""
    one = [sized(width, exponent=0.5 + 0.1 * (width == 16)) for width in WIDTHS]
    key = (Arm("lion_paper"), 1000, size_points.WITHOUT)
    alone = size_points.points(one)[key].fit
    assert size_points.points([*one, *(each | {"seed": 2} for each in one)])[key].fit == alone
    other = [sized(width, exponent=0.5 - 0.1 * (width == 16), seed=2) for width in WIDTHS]
    both = size_points.points([*one, *other])[key].fit
    assert both is not None and (both.exponent, both.high - both.low) == pytest.approx((0.5, 0.0), abs=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_the_exponents_of_the_seeds_are_compared() -> None:
    """The second seed has three of the four sizes: only these are in both fits."""
    records = [sized(width) for width in WIDTHS] + [sized(width, exponent=0.4, seed=2) for width in WIDTHS[:3]]
    found = size_points.points(records)[Arm("lion_paper"), 1000, size_points.WITHOUT]
    assert found.seed_slopes == pytest.approx([0.5, 0.4])
    assert "their exponents differ by up to 0.10" in size_findings.exponents(sizes_of(records)).verdict
    assert "All fits have one seed." in size_findings.exponents(sizes_of(records[:4])).verdict


@pytest.mark.usefixtures("no_pictures")
def test_two_rates_of_one_optimizer_have_their_own_fits() -> None:
    slow = [sized(width, exponent=0.4, lr=1e-4) for width in WIDTHS]
    fast = [sized(width) for width in (*WIDTHS, 256)]
    finding = size_findings.exponents(sizes_of([*slow, *fast]))
    rows = {(row[0], row[2]): row for row in finding.tables[0][1:]}
    assert rows["LION at 0.001", size_points.WITHOUT][3:6] == ["5", "5", "0.500 [0.500, 0.500]"]
    assert rows["LION at 0.0001", size_points.WITHOUT][3:6] == ["4", "4", "0.400 [0.400, 0.400]"]
    assert finding.judgements[1].basis == "GPTs of 4 to 5 sizes (9 runs, one seed), d = 400 to 102,400, exact rounds"
    assert finding.verdict.endswith("and LION a tenth of its rate as well.")


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_did_not_learn_is_left_out() -> None:
    records = [sized(width, exponent=0.5 + 0.2 * (width == 16)) for width in WIDTHS]
    found = size_findings.exponents(sizes_of([*records, sized(9, fell=False)]))
    assert found.missing == ["left out, because the training loss did not fall by 0.1: width-9-lion_paper-1"]
    assert found.judgements[0].verdict.startswith("All parameters: undecided")
    assert found.tables[0][1][3:5] == ["4", "4"]
    assert size_findings.exponents(sizes_of(records[:2])).judgements[0].verdict == "fewer than 3 sizes"
    assert size_findings.exponents(sizes_of([sized(9, fell=False)])).verdict.startswith("Cannot be said")


@pytest.mark.parametrize(
    ("low", "high", "side"),
    [
        (0.45, 0.55, size_findings.INSIDE),
        (0.4, 0.6, size_findings.UNDECIDED),
        (-0.112, 0.171, size_findings.BELOW),  # a wide interval that does not include 0.5
        (0.51, 0.9, size_findings.ABOVE),
    ],
)
def test_an_interval_without_a_half_decides_however_wide(low: float, high: float, side: str) -> None:
    fit = theory.PowerLaw(exponent=(low + high) / 2, low=low, high=high, coefficient=1.0, points=5)
    assert size_findings.decided(fit) == side


def test_the_slopes_of_the_ends_show_a_curve() -> None:
    bent = size_points.Points(d=[10, 100, 1000, 10000, 10000], r=[1.0, 10.0, 30.0, 30.0, 120.0], seeds=[1, 1, 1, 1, 2])
    assert bent.end_slopes == ["1.00", "0.30"]
    assert size_points.Points(d=[10, 10], r=[1.0, 2.0], seeds=[1, 2]).end_slopes == ["-", "-"]


def test_r_is_drawn_against_d() -> None:
    """Only one set, because a picture of all takes seconds."""
    found = size_points.points([sized(width) for width in WIDTHS])
    svg = size_drawing.draw(found, (size_points.WHOLE,))
    assert svg.startswith("<svg") and svg.count('<g id="axes_') == 2
