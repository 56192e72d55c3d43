"""The report of the toy problem: every verdict follows the record."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_report import scaling_result
from tests.tools.test_report_pages import pages
from tools.paper.reporting import toy_findings

Grid = dict[tuple[float, float], float]  # left / right at the end by eta and lambda
OWN: Grid = {(0.01, 0.1): 0.5}
CORNER: Grid = {(0.001, 0.05): 3.2, (0.001, 0.1): 1.03, (0.01, 0.05): 0.9}
SMALL_IN_LARGE, SOME = r"small $\eta$ in a large box", r"some $\eta$ and $\lambda$"


def toy_result(folder: Path, slope: float, at_the_end: float, over_from: int | None, **grids: Grid) -> None:
    averaged = {"largest": 1.2, "at": 3, "over_from": over_from, "over_to": 9, "at_the_end": at_the_end}
    corollary = {"rows": [{"steps": 10}], "slope": slope, "slope_low": slope - 0.01, "slope_high": slope + 0.01}
    content: dict[str, Any] = {"minimum": [2.1253, 1.8843]}
    for name in ("constrained", "unconstrained"):
        content[name] = {"corollary": corollary, "paper": {"averaged": averaged, "weight_decay": 0.1}}
    for name, grid in grids.items():
        content[name]["grid"] = [
            {"lr": lr, "weight_decay": decay, "largest": end + 0.5, "at_the_end": end}
            for (lr, decay), end in grid.items()
        ]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content))
    for name in ("corollary", "A1a_surface", "A1b_contours", "A2a_constrained", "A2b_unconstrained"):
        (folder / f"{name}.svg").write_text("<svg></svg>")


@pytest.mark.parametrize(
    ("slope", "end", "over", "rate", "bound"),
    [
        (-0.25, 0.5, 3, True, "holds in part: at the end, not for every $k$ (constrained, unconstrained)"),
        (-0.24, 0.5, None, True, "holds for every $k$"),
        (-0.20, 1.1, 3, False, "does not hold: the left side is above the bound at the end"),
    ],
)
def test_the_toy_problem_is_judged_by_its_numbers(
    tmp_path: Path, slope: float, end: float, over: int | None, rate: bool, bound: str
) -> None:
    toy_result(tmp_path / "toy", slope, end, over)
    makers = (toy_findings.rates, toy_findings.pictures, toy_findings.bound)
    rates, pictures, bounds = (make(tmp_path / "toy", "") for make in makers)
    word, close = ("holds in part", "") if rate else ("does not hold", "not both ")
    said = f"{word} on the toy problem: the exponents of $K$ are {close}within 0.02 of $-1/4$"
    assert rates.judgements[0].verdict == f"{said}. Nothing is shown about $d$"
    assert rates.judgements[0].numbers == f"exponents of $K$: constrained {slope:.4f}, unconstrained {slope:.4f}"
    assert rates.verdict.startswith(f"{said[0].upper()}{said[1:]}")
    assert "share their starts, so its interval is too narrow" in rates.verdict
    assert pictures.judgements[0].verdict == "holds to the digits given"
    assert [one.verdict for one in bounds.judgements] == [bound]
    assert bounds.missing == [f"{tmp_path / 'toy' / 'result.json'} has no other eta and lambda"]


@pytest.mark.parametrize(
    ("box", "free", "verdict", "numbers"),
    [
        (
            OWN | CORNER,
            {(0.001, 0.0): 0.4},
            f"holds in part: at the end for 2 of 4 settings; does not hold for {SMALL_IN_LARGE}",
            r"constrained, $\eta = 0.001$: 3.200, 1.030 for $\lambda$ = 0.05, 0.1; the others at most 0.900",
        ),
        (
            OWN | {(0.001, 0.05): 0.9, (0.01, 0.05): 2.0},
            {(0.001, 0.0): 0.4},
            f"holds in part: at the end for 2 of 3 settings; does not hold for {SOME}",
            r"constrained, $\eta = 0.01$: 2.000 for $\lambda$ = 0.05; the others at most 0.900",
        ),
        (
            OWN | CORNER,
            {(0.001, 0.0): 1.4},
            f"holds in part: at the end for 1 of 4 settings; does not hold for {SOME}",
            r"constrained, $\eta = 0.001$: 3.200, 1.030 for $\lambda$ = 0.05, 0.1; "
            r"unconstrained, $\eta = 0.001$: 1.400 for $\lambda$ = 0; the others at most 0.900",
        ),
        (OWN | {(0.1, 1.0): 0.3}, OWN, "holds: at the end for 1 of 1 settings", "all at most 0.300"),
        (
            OWN | {(0.1, 1.0): 1.3},
            {},
            "does not hold: at the end for 0 of 1 settings",
            r"constrained, $\eta = 0.1$: 1.300 for $\lambda$ = 1",
        ),
    ],
)
def test_other_eta_and_lambda_are_judged_by_the_record(
    tmp_path: Path, box: Grid, free: Grid, verdict: str, numbers: str
) -> None:
    toy_result(tmp_path / "toy", -0.25, 0.5, None, constrained=box, unconstrained=free)
    found = toy_findings.bound(tmp_path / "toy", "")
    judged = found.judgements[1]
    assert judged.verdict == verdict and judged.numbers == f"left / right at the end: {numbers}"
    assert rf"For other $\eta$ and $\lambda$ the claim {verdict}." in found.verdict and not found.missing
    assert ("they arrive late" in found.verdict) == (SMALL_IN_LARGE in verdict)


def test_the_settings_of_the_toy_problem_are_tables_of_eta_and_lambda(tmp_path: Path) -> None:
    toy_result(tmp_path / "toy", -0.25, 0.5, None, constrained=OWN | {(0.001, 0.05): 3.2, (0.001, 0.1): 1.03})
    rows, page, _ = pages(tmp_path, tmp_path / "out", exhibits=("Figure A2",))
    (found,) = rows["Figure A2"].findings
    assert found.tables[1:] == [
        [
            ["constrained: left / right at the end", r"$\lambda = 0.05$", r"$\lambda = 0.1$"],
            [r"$\eta = 0.001$", "3.200 (largest 3.700)", "1.030 (largest 1.530)"],
            [r"$\eta = 0.01$", "-", "0.500 (largest 1.000)"],
        ]
    ]
    basis = r"toy problem, d = 2, constrained $\eta$ 0.001, $\lambda$ 0.05 to 0.1; 2,000 steps, 5 starts x 5 repeats"
    assert found.judgements[1].basis == basis and "$" not in page


def test_the_intro_says_which_runs_have_the_papers_setting(tmp_path: Path) -> None:
    toy_result(tmp_path / "toy", -0.25, 0.5, None)
    _, _, text = pages(tmp_path, tmp_path / "out", exhibits=("Table 1", "Figure A2", "Figure A4"))
    own = "Only the runs of the toy problem ({}) have the paper's own setting."
    both = "Table 1, Figure A2"
    assert f"\n2 of 3 exhibits have a run here ({both}). {own.format(both)} Hardware: " in text
    rest = "are smaller, or on other data, unless their section says otherwise. Hardware: "
    scaling_result(tmp_path / "scaling", (10**4, 10**5, 10**6))
    _, page, text = pages(tmp_path, tmp_path / "out", exhibits=("Table 1", "Section 5"))
    assert f"{own.format('Table 1')} The others {rest}" in text
    _, _, text = pages(tmp_path, tmp_path / "out", exhibits=("Section 5",))
    assert f"\n1 of 1 exhibits have a run here (Section 5). The runs {rest}" in text
    assert page.index("Holds in part: in some settings") < page.index('id="summary"'), "words before their use"
