"""The report's pages: the summary, formulas, pictures, the digits' constants, and how long the runs take."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.tools.test_report import HARDWARE, language_run, scaling_result
from tools.paper import report
from tools.paper.reporting import drawings, findings, formulas, run_times
from tools.paper.reporting.findings import Judgement
from tools.paper.reporting.pages import Row
from tools.paper.reporting.paper import EXHIBITS
from tools.paper.studies import figures, rates


def pages(runs: Path, output: Path, **kwargs: Any) -> tuple[dict[str, Row], str, str]:
    """The rows by exhibit, the HTML page and the Markdown page."""
    runs.mkdir(exist_ok=True)
    rows = report.write_report(runs, output, HARDWARE, **kwargs)
    texts = [(output / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")]
    return {row.exhibit.name: row for row in rows}, texts[0], texts[1]


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("K^{-1/4}", "<msup><mi>K</mi><mrow><mo>−</mo><mn>1</mn><mo>/</mo><mn>4</mn></mrow></msup>"),  # noqa: RUF001
        (r"\theta_1^2", "<msubsup><mi>θ</mi><mn>1</mn><mn>2</mn></msubsup>"),
        (r"\sqrt{d}", "<msqrt><mi>d</mi></msqrt>"),
        (r"\frac{a}{2}", "<mfrac><mrow><mi>a</mi></mrow><mrow><mn>2</mn></mrow></mfrac>"),
        (r"c_{\mathrm{LION}}", '<msub><mi>c</mi><mrow><mi mathvariant="normal">LION</mi></mrow></msub>'),
    ],
)
def test_formulas_are_mathml(formula: str, expected: str) -> None:
    assert formulas.with_mathml(f"a < b ${formula}$ c") == f"a &lt; b <math>{expected}</math> c"


def test_a_norms_index_is_the_norms() -> None:
    norm = ElementTree.fromstring(formulas.mathml(r"\Vert \nabla f \Vert_1"))[0]
    assert norm.tag == "msub" and "".join(norm[0].itertext()) == "‖∇f‖" and norm[1].text == "1"


@pytest.mark.parametrize("formula", [r"\foo", r"\sqrt{d", "a_1_2", "{a", "a^", r"\Vert g", "a#b"])
def test_a_formula_outside_the_subset_is_refused(formula: str) -> None:
    with pytest.raises(ValueError, match=r"Known are letters, numbers, _, \^"):
        formulas.with_mathml(f"${formula}$")


def test_text_without_formulas_is_only_escaped_and_titles_have_letters() -> None:
    for text in ("costs $5 and $6", "for o in a; do run $o x; run $o y; done", "r = sqrt(d)"):
        assert formulas.with_mathml(text) == formulas.to_plain(text) == text
    text = r"$r = \Vert g \Vert_1 / \sqrt{d}$, $K^{-1/4}$, $c_{\mathrm{LION}}$"
    assert formulas.to_plain(text) == "r = ||g||_1 / sqrt(d), K^(-1/4), c_(LION)"


def test_every_formula_of_the_paper_is_well_formed_in_either_page(tmp_path: Path) -> None:
    _, page, text = pages(tmp_path / "runs", tmp_path / "out")
    found = [piece.partition("</math>")[0] for piece in page.split("<math>")[1:]]
    assert len(found) > 40 and r"$\sqrt{d} K^{-1/4}$" in text
    for formula in found:
        ElementTree.fromstring(f"<math>{formula}</math>")
    assert "\\" not in page, "a formula is left as it was"
    assert "theta" not in page
    for old in ("sqrt(d)", "K^(-1/4)", "||g||"):
        assert old not in page and old not in text


def test_a_summary_of_every_exhibit_is_first(tmp_path: Path) -> None:
    _, page, text = pages(tmp_path / "runs", tmp_path / "out")
    assert page.index('id="summary"') < page.index('id="table-1"')
    lines = text[text.index("## Summary") : text.index("## Table 1")].splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines if line] == [f"| {exhibit.name}" for exhibit in EXHIBITS]
    assert all(line.endswith("| not run here | - | - |") for line in lines if line)
    assert page.count('data-head="verdict" class="verdict-cell">not run here</td>') == len(EXHIBITS)


def test_the_summary_has_the_judgements_of_the_findings(tmp_path: Path) -> None:
    scaling_result(tmp_path / "scaling", (10**4, 10**5, 10**6))
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / "rates.json").write_text("[]")
    rows, page, text = pages(tmp_path, tmp_path / "out")
    (judgement,) = rows["Section 5"].judgements
    assert judgement.verdict == "not refuted: 0.5 is inside all of 1 intervals. Narrower than 0.15: 0"
    assert judgement.basis == "GPTs of 3 sizes, d = 10,000 to 1,000,000, 1 seed"
    line = f"| Section 5 | {judgement.claim} | {judgement.verdict} | {judgement.basis} | {judgement.numbers} |"
    assert line in text and judgement.verdict in page
    assert rows["Figure A3"].judgements[0].verdict == "its record is damaged"


def test_a_finding_without_judgements_refers_to_its_section() -> None:
    found = findings.Finding(verdict="Held", made="here", tables=[[["a"], ["1"]]])
    row = Row(exhibit=EXHIBITS[0], findings=[found], problems=[])
    assert [one.verdict for one in row.judgements] == ["see its section"]
    found.judgements = [Judgement(claim="c", verdict="v", basis="b", numbers="n")]
    assert row.judgements == found.judgements


def toy_result(folder: Path, slope: float, at_the_end: float, over_from: int | None) -> None:
    averaged = {"largest": 1.2, "at": 3, "over_from": over_from, "over_to": 9, "at_the_end": at_the_end}
    corollary = {"rows": [{"steps": 10}], "slope": slope, "slope_low": slope - 0.01, "slope_high": slope + 0.01}
    problem = {"corollary": corollary, "paper": {"averaged": averaged}}
    folder.mkdir(parents=True)
    content = {"minimum": [2.1253, 1.8843], "constrained": problem, "unconstrained": problem}
    (folder / "result.json").write_text(json.dumps(content))
    for name in ("corollary", "A1a_surface", "A1b_contours", "A2a_constrained", "A2b_unconstrained"):
        (folder / f"{name}.svg").write_text("<svg></svg>")


@pytest.mark.parametrize(
    ("slope", "end", "over", "rate", "inside", "bound"),
    [
        (-0.25, 0.5, 3, "agrees", 2, "holds at the end, not for every $k$ (constrained, unconstrained)"),
        (-0.24, 0.5, None, "agrees", 2, "holds for every $k$"),
        (-0.20, 1.1, 3, "does not agree", 0, "does not hold at the end"),
    ],
)
def test_the_toy_problem_is_judged_by_its_numbers(
    tmp_path: Path, slope: float, end: float, over: int | None, rate: str, inside: int, bound: str
) -> None:
    toy_result(tmp_path / "toy", slope, end, over)
    found = [make(tmp_path / "toy", "") for make in (findings.toy_rates, findings.toy_pictures, findings.toy_bound)]
    verdicts = [one.judgements[0].verdict for one in found]
    assert verdicts[0].startswith(f"the power of $K$ {rate} within 0.02") and f"inside {inside} of 2" in verdicts[0]
    assert verdicts[1:] == ["holds to the digits given", bound]


def test_one_short_pair_of_runs_is_not_called_a_confirmation(tmp_path: Path) -> None:
    for name, loss in (("lion", 2.0), ("sgd", 3.0)):
        language_run(tmp_path / name, loss)
    found = findings.language({name: tmp_path / name for name in ("lion", "sgd")}, "tiny GPT", "here")
    (judgement,) = found.judgements
    assert judgement.verdict.startswith("LION ends lower in one short run, which shows little")
    assert judgement.basis == "tiny GPT, d = 400, 40 steps, 1 seed"


def digits_run(folder: Path, optimizer: str, l1: float, l2: float, epochs: int = 4) -> None:
    """4 of 4 epochs of 10 steps with the same gradient after each, unless ``epochs`` says fewer."""
    folder.mkdir(parents=True)
    shared = {"model": "resnet18", "optimizer": optimizer, "lr": 3e-5, "epochs": 4, "data": "digits, 9 images"}
    shared |= {"d": 400, "l1": l1, "l2": l2, "ratio_over_sqrt_d": l1 / l2 / 20, "loss": l2, "top1": 1 - l2 / 10}
    lines = [shared | {"epoch": epoch, "iteration": 10 * epoch} for epoch in range(1, epochs + 1)]
    (folder / "epochs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_digits_of_100_epochs_are_in_figure_1_and_figure_a3(tmp_path: Path) -> None:
    folder = tmp_path / "vision" / "digits-100"
    digits_run(folder / "resnet18-lion", "lion", 8.0, 2.0)
    digits_run(folder / "resnet18-sgd", "sgd", 9.0, 3.0, epochs=3)
    rows, page, _ = pages(tmp_path, tmp_path / "out", exhibits=("Figure 1", "Figure A3"))
    (curves,), (constants,) = (rows[name].findings for name in ("Figure 1", "Figure A3"))
    for one in (curves, constants):
        assert one.verdict.startswith("The data set is digits, not the paper's.") and one.pictures
    # Constant norms, so the last of the epochs that both have, step 30, decides; sqrt(d) is 20.
    assert constants.tables[0][1][1] == f"{8.0 * 30**0.25 / 20:.4f}" and constants.tables[0][1][4] == "30"
    assert constants.tables[0][2][1] == f"{3.0 * 30**0.25:.4f}" and constants.tables[0][2][-1] == "exact"
    assert "One seed, where the paper has the mean of five" in constants.verdict and "3 epochs" in constants.made
    assert constants.missing == [f"{folder} was cut short: both runs have 3 of 4 epochs"]
    (judgement,) = constants.judgements
    assert judgement.verdict == "not established in one seed (the paper has five)"  # the last step decides
    assert curves.judgements[0].verdict.startswith("seen in one seed: lower loss after 3, higher top-1 after 3 of 3")
    assert "1 seeds" not in page


def test_constants_of_one_optimizer_cannot_be_said(tmp_path: Path) -> None:
    digits_run(tmp_path / "vision" / "digits-100" / "resnet18-lion", "lion", 8.0, 2.0)
    rows, _, text = pages(tmp_path, tmp_path / "out", exhibits=("Figure A3",))
    assert "Cannot be said of digits: resnet18 with both optimizers is needed." in text
    assert not rows["Figure A3"].was_run


def record(optimizer: str, seed: int, l1: float, **more: Any) -> dict[str, Any]:
    """The record of a long run: rounds at 5 steps (only the last converged), exact rounds at two."""
    rounds = {"iteration": [1, 2, 3, 4, 5], "l1": [l1] * 5, "l2": [2.0] * 5, "converged": [False] * 4 + [True]}
    exact = {step: {"loss": 4.5, "ratio": l1 / 4} for step in ("0", "5")}
    losses = {"training_loss": {str(step): 5.0 for step in range(1, 6)}, "validation_loss": {"5": 5.5}}
    known = {"name": f"gpt-{optimizer}-{seed}", "optimizer": optimizer, "seed": seed, "d": 400, "steps": 5}
    return (
        known | losses | {"rounds": rounds, "exact": exact, "cpu_hours": 1.5, "study": "other", "model": "gpt"} | more
    )


@pytest.fixture
def figure_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The figure that a drawing makes, instead of its SVG text."""
    monkeypatch.setattr(figures, "svg", lambda figure: figure)
    return lambda draw, *arguments: draw(*arguments)


GROUPS = {name: [record(name, seed, 6.0 + seed) for seed in (1, 2)] for name in ("lion_paper", "sgd_paper")}
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
    assert len(diamonds) == 4 and all(list(line.get_ydata()) == [4.5, 4.5] for line in diamonds)
    assert len({line.get_markersize() for line in diamonds}) == 2, "coinciding marks are told apart"
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert "left: loss on held-out text" in words and "lines: mean of the seeds; bands: smallest to largest" in words
    assert {"LION", "SGD, momentum 0.9"} <= set(words)


def test_a_round_that_is_not_finite_leaves_a_gap(figure_of: Callable[..., Any]) -> None:
    one = record("sgd_paper", 1, 6.0)
    one["rounds"]["l1"][2] = None
    ratio = figure_of(drawings.long_runs, {"sgd_paper": [one]}, WORDS).axes[1]
    drawn = next(line for line in ratio.lines if len(line.get_xdata()) == 5)
    assert [math.isfinite(value) for value in drawn.get_ydata()] == [True, True, False, True, True]


def test_constants_are_drawn_with_a_band_over_the_seeds(figure_of: Callable[..., Any]) -> None:
    repeats = {
        name: {
            "steps": [1, 2, 3, 4, 5],
            "d": 400,
            "norms": [one["rounds"][rates.NORMS[name]] for one in GROUPS[f"{name}_paper"]],
            "l2_norms": [one["rounds"]["l2"] for one in GROUPS[f"{name}_paper"]],
        }
        for name in ("lion", "sgd")
    }
    found = rates.constants(repeats)
    lion, sgd = figure_of(drawings.constants, GROUPS, WORDS, found).axes
    assert lion.get_title() == "(a) LION, mean of 2 runs" and sgd.get_title() == "(b) SGD, momentum 0.9, mean of 2 runs"
    assert [list(line.get_ydata()) for line in lion.lines] == [found["lion"]["left"], found["lion"]["right"]]
    heights = lion.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (7.0, 8.0), "running means of the two seeds' l1 norms"
    plain = figure_of(drawings.constants, {}, WORDS, found).axes[0]
    assert not plain.collections and len(plain.lines) == 2


def test_the_times_of_runs_are_by_run_and_of_all_seeds() -> None:
    records = [record("lion_paper", 1, 1.0, measure_cpu_hours=0.5), record("lion_paper", 2, 1.0, cpu_hours=2.5)]
    table = run_times.table([*records, record("sgd_paper", 1, 1.0)])
    assert table[1] == ["gpt-lion_paper", "400", "5", "2", "2.00 (1.50 to 2.50)", "0.50", "4.50"]
    assert table[2] == ["gpt-sgd_paper", "400", "5", "1", "1.50", "-", "1.50"]
    assert table[3] == ["all", "", "", "3", "", "", "6.00"]
    assert len(run_times.table([])) == 1


def test_times_are_at_the_end_and_a_damaged_record_leaves_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(record("lion_paper", 1, 1.0)))
    _, page, text = pages(tmp_path / "runs", tmp_path / "out", long_runs=folder, exhibits=("Figure 2",))
    assert text.index("## Figure 2") < text.index("## How long the runs take") and HARDWARE in text[-900:]
    assert "| gpt-lion_paper | 400 | 5 | 1 | 1.50 | - | 1.50 |" in text and 'id="times"' in page
    (folder / "b.json").write_text("{")
    rows, page, _ = pages(tmp_path / "runs", tmp_path / "out", long_runs=folder, exhibits=("Figure 2",))
    assert "b.json is not a record" in rows["Figure 2"].problems[0] and "No long run is finished." in page


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name, norm in (("lion", 2.0), ("sgd", 3.0)):
        digits_run(tmp_path / "vision" / "digits-100" / f"resnet18-{name}", name, 4 * norm, norm)
    made = []
    for _ in range(2):
        pages(tmp_path, tmp_path / "out", exhibits=("Figure A3",))
        made.append({path.name: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.*"))})
    assert made[0] == made[1] and len(made[0]) == 3
