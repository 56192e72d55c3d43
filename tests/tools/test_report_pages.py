"""The report's pages: the summary, formulas, and how long the runs take."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.tools.test_report import HARDWARE, language_run, scaling_result
from tools.paper import report
from tools.paper.reporting import findings, formulas, run_times
from tools.paper.reporting.findings import Judgement
from tools.paper.reporting.pages import Row
from tools.paper.reporting.paper import EXHIBITS


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
    assert judgement.verdict == "undecided: 0.5 is inside 1 of 1 intervals. Narrower than 0.15: 0"
    assert judgement.basis == "GPTs of 3 sizes, d = 10,000 to 1,000,000, 1 seed"
    line = f"| Section 5 | {judgement.claim} | {judgement.verdict} | {judgement.basis} | {judgement.numbers} |"
    assert line in text and judgement.verdict in page
    assert rows["Figure A3"].judgements[0].verdict == "its record is damaged"


def test_a_finding_without_judgements_refers_to_its_section() -> None:
    found = findings.Finding(verdict="Holds", made="here", tables=[[["a"], ["1"]]])
    row = Row(exhibit=EXHIBITS[0], findings=[found], problems=[])
    assert [one.verdict for one in row.judgements] == ["see its section"]
    found.judgements = [Judgement(claim="c", verdict="v", basis="b", numbers="n")]
    assert row.judgements == found.judgements


def test_one_short_pair_of_runs_is_not_called_a_confirmation(tmp_path: Path) -> None:
    for name, loss in (("lion", 2.0), ("sgd", 3.0)):
        language_run(tmp_path / name, loss)
    found = findings.language({name: tmp_path / name for name in ("lion", "sgd")}, "tiny GPT", "here")
    (judgement,) = found.judgements
    assert judgement.verdict.startswith(
        "seen in one seed: LION ends lower in training loss. One short run shows little"
    )
    assert found.verdict.startswith(findings.sentence(judgement.verdict))
    assert judgement.basis == "tiny GPT, d = 400, 40 steps, 1 seed"


def record(optimizer: str, seed: int, l1: float, **more: Any) -> dict[str, Any]:
    """The record of a long run: rounds at 5 steps (only the last converged), exact rounds at two."""
    rounds = {"iteration": [1, 2, 3, 4, 5], "l1": [l1] * 5, "l2": [2.0] * 5, "converged": [False] * 4 + [True]}
    exact = {step: {"loss": 4.5, "ratio": l1 / 4} for step in ("0", "5")}
    losses = {"training_loss": {str(step): 5.0 for step in range(1, 6)}, "validation_loss": {"5": 5.5}}
    known = {"name": f"gpt-{optimizer}-{seed}", "optimizer": optimizer, "seed": seed, "d": 400, "steps": 5}
    return (
        known | losses | {"rounds": rounds, "exact": exact, "cpu_hours": 1.5, "study": "other", "model": "gpt"} | more
    )


def test_the_times_of_runs_are_by_run_and_of_all_seeds() -> None:
    records = [record("lion_paper", 1, 1.0, measure_cpu_hours=0.5), record("lion_paper", 2, 1.0, cpu_hours=2.5)]
    table = run_times.table([*records, record("sgd_paper", 1, 1.0)])
    assert table[1] == ["gpt-lion_paper", "400", "5", "2", "2.00 (1.50 to 2.50)", "0.50", "4.50"]
    assert table[2] == ["gpt-sgd_paper", "400", "5", "1", "1.50", "-", "1.50"]
    assert table[3] == ["all", "", "", "3", "", "", "6.00"]
    assert len(run_times.table([])) == 1


def test_seeds_of_other_lengths_have_their_own_row_of_times() -> None:
    """Their mean would be of runs that are not comparable."""
    whole = record("lion_paper", 1, 0.5)
    table = run_times.table([whole, whole | {"seed": 2, "steps": 1000, "name": whole["name"].removesuffix("1") + "2"}])
    assert [row[2:4] for row in table[1:-1]] == [[f"{whole['steps']:,}", "1"], ["1,000", "1"]]


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
