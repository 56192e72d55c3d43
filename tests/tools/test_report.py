"""report.py: what is there beside the paper's, what is not with its command, and damaged records in words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.config import LionError
from tools.paper import report
from tools.paper.reporting import rate_findings
from tools.paper.reporting.formulas import C_LION, C_SGD
from tools.paper.reporting.paper import EXHIBITS, RATES_FOUND
from tools.paper.reporting.vision_findings import UNTUNED

HARDWARE = "a test's machine"
STEP = " iteration {0}/ 40 | elapsed time per iteration (ms): 5.0 | lm loss: {1:.4E} |\n"


def rows(runs: Path, output: Path) -> dict[str, Any]:
    return {row.exhibit.name: row for row in report.write_report(runs, output, HARDWARE)}


def language_run(folder: Path, loss: float, steps: int = 40, dims: tuple[int, ...] = (400, 400)) -> None:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(STEP.format(step, loss) for step in range(10, steps + 1, 10)))
    lines = [
        {"iteration": 20 * index, "d": d, "ratio": 8.0, "ratio_over_sqrt_d": 0.4, "converged": True}
        for index, d in enumerate(dims)
    ]
    (folder / "norm_ratio.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def recipe_run(folder: Path, optimizer: str, **kwargs: Any) -> None:
    language_run(folder, **kwargs)
    names = {"model": "gpt2_small", "optimizer": optimizer, "cluster": "a100x16"}
    (folder / "recipe.json").write_text(json.dumps({"names": names}))


def rates_result(folder: Path, lion: float, sgd: float, **more: Any) -> None:
    folder.mkdir(parents=True)
    shared = {"at_step": 40, "converged": 3, "rounds": 5, "d": 400, "steps": [20, 40], "repeats": 5, **more}
    found = {"lion": {**shared, "constant": lion}, "sgd": {**shared, "constant": sgd}}
    found["lion"]["l2_constant"], found["sgd"]["l2_constant"] = 1.2, sgd
    found["sgd"]["lr"] = 10 * more.get("lr", 0)
    ln = {"lion": [[3.0, 2.9], [3.1, 2.9]], "sgd": [[3.3, 3.2], [3.3, 3.0]], "steps": [20, 40]}
    ln |= {"lion_lower": 1, "seeds": 2, "below_from": 40}
    (folder / "rates.json").write_text(json.dumps({"rates": found, "perplexity": ln}))
    (folder / "A3.svg").write_text("<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'></svg>")


def test_without_runs_every_exhibit_is_there_with_the_command_that_makes_it(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    found = rows(tmp_path / "runs", tmp_path / "out")
    names = [f"Figure {name}" for name in ("1", "2", "3", "A1", "A2", "A3", "A4", "A5")]
    assert set(found) >= {*names, "Table 1", "Table A1", "Table A2"}
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert page.count("Not run here.") == text.count("Not run here.") == len(EXHIBITS)
    assert "-m tools.paper.vision_study --dataset cifar100" in page and "gpt2_medium $o a100x16" in text
    assert f"\n0 of {len(EXHIBITS)} exhibits have a run here. Hardware: {HARDWARE}." in text
    assert "8.202" in page and "| GPT-2 Medium | LION | 3.221 |" in text


def test_the_claim_of_table_a2_is_only_its_numbers() -> None:
    pairs = [cell.split(" / ") for row in RATES_FOUND[1:] for cell in row[1:]]
    lower = sum(float(lion) <= float(sgd) for lion, sgd in pairs)
    (claim,) = (exhibit.claim for exhibit in EXHIBITS if exhibit.name == "Table A2")
    said = f"by its table, LION's best rate is at most SGD's in {lower} of {len(pairs)}."
    assert claim == f"none in words; {said}"


def test_the_page_asks_for_nothing_outside_itself(tmp_path: Path) -> None:
    rates_result(tmp_path / "runs" / "rates", 0.5, 1.0)
    rows(tmp_path / "runs", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)", page)
    assert len(addresses) > len(EXHIBITS)
    assert all(
        address.startswith(("#", "data:image/svg+xml;base64,")) for pair in addresses for address in pair if address
    )
    assert "<script" not in page and "<link" not in page and "@import" not in page


def test_verdicts_follow_the_numbers(tmp_path: Path) -> None:
    rates_result(tmp_path / "a" / "rates", 0.5, 1.0)
    held = rows(tmp_path / "a", tmp_path / "out")
    assert held["Figure A3"].findings[0].verdict.startswith(f"Not established: {C_LION} = 0.500, {C_SGD} = 1.000.")
    norms = rf"{C_LION} uses $\ell_1 / \sqrt{{d}}$, which is at most $\ell_2$. In $\ell_2$, as for {C_SGD}, LION's"
    assert f" {norms} constant is 1.200. " in held["Figure A3"].findings[0].verdict
    assert f"{C_SGD} is decided by the last step" in held["Figure A3"].findings[0].verdict
    (table_a1,) = held["Table A1"].findings
    said = "Not established: LION's first is below SGD's last in 1 of 2 seeds; LION is below it in all of them"
    assert table_a1.verdict == f"{said} from step 40 on."
    assert table_a1.tables[0][1:] == [["SGD, mean", "3.300", "3.100"], ["LION, mean", "3.050", "2.900"]]
    assert table_a1.tables[1][1:] == [["1", "3.000", "3.200"], ["2", "3.100", "3.000"]]
    rates_result(tmp_path / "b" / "rates", 1.5, 1.0, at_step=20)
    assert rows(tmp_path / "b", tmp_path / "out")["Figure A3"].findings[0].verdict.startswith("Does not hold: ")
    rates_result(tmp_path / "c" / "rates", 1.1, 1.3, at_step=20)
    assert rows(tmp_path / "c", tmp_path / "out")["Figure A3"].findings[0].verdict.startswith("Holds: ")
    rates_result(tmp_path / "d" / "rates", 1.1, 1.3, at_step=20, repeats=1)
    assert rows(tmp_path / "d", tmp_path / "out")["Figure A3"].findings[0].verdict.startswith("Seen in one seed: ")


@pytest.mark.parametrize(
    ("lower", "seeds", "expected"),
    [(5, 5, "holds"), (0, 5, "does not hold"), (4, 5, "not established"), (1, 1, "seen in one seed")],
)
def test_perplexities_are_judged_by_their_seeds(tmp_path: Path, lower: int, seeds: int, expected: str) -> None:
    folder = tmp_path / "rates"
    rates_result(folder, 0.5, 1.0)
    content = json.loads((folder / "rates.json").read_text())
    content["perplexity"] |= {"lion_lower": lower, "seeds": seeds}
    (folder / "rates.json").write_text(json.dumps(content))
    assert rate_findings.perplexities(folder, "").judgements[0].verdict == expected


def test_either_proportion_of_learning_rates_stands_beside_the_papers(tmp_path: Path) -> None:
    rates_result(tmp_path / "runs" / "rates", 0.5, 1.0)
    rates_result(tmp_path / "runs" / "rates-10to1", 0.4, 1.0, lr=1e-3)
    found = rows(tmp_path / "runs", tmp_path / "out")
    assert len(found["Figure A3"].findings) == 2
    untold, told = found["Table A1"].findings
    assert "times LION's" not in untold.verdict and "SGD's rate is 10 times LION's here" in told.verdict


def test_constants_of_exact_gradients_are_told_from_those_of_rounds(tmp_path: Path) -> None:
    rates_result(tmp_path / "runs" / "rates", 0.5, 1.0)
    rates_result(tmp_path / "runs" / "rates-vision", 0.5, 1.0, exact=True, lr=1e-3)
    rounds, exact = rows(tmp_path / "runs", tmp_path / "out")["Figure A3"].findings
    assert "Noise adds" in rounds.verdict and rounds.tables[0][1][-2:] == ["-", "3 of 5"]
    assert "the whole training set's gradient" in exact.verdict and exact.tables[0][1][-2:] == ["0.001", "exact"]


def test_language_runs_are_paired_by_their_recipes(tmp_path: Path) -> None:
    recipe_run(tmp_path / "runs" / "w", "lion", loss=1.0)  # tuned; not the paper's
    recipe_run(tmp_path / "runs" / "x", "lion_paper", loss=2.0)
    recipe_run(tmp_path / "runs" / "y", "sgd_paper", loss=3.0)
    (found,) = rows(tmp_path / "runs", tmp_path / "out")["Figure 3"].findings
    assert found.verdict.startswith("Seen in one seed: LION ends lower in training loss.") and not found.missing
    assert found.tables[0][1] == ["LION", "40", "2.0000", "-", "0.400 to 0.400", "2 of 2"]
    assert "gpt2_small, d = 400, 40 steps" in found.made and HARDWARE in found.made
    assert (tmp_path / "out" / "figures" / "figure-3-0-0.svg").read_text().startswith("<svg")


def test_a_run_cut_short_and_one_that_mixes_models_are_said_in_the_report(tmp_path: Path) -> None:
    recipe_run(tmp_path / "runs" / "x", "lion", loss=2.0, steps=20)
    recipe_run(tmp_path / "runs" / "y", "sgd", loss=3.0, dims=(400, 900))
    (found,) = rows(tmp_path / "runs", tmp_path / "out")["Figure 3"].findings
    assert found.verdict == "Not established: only one optimizer has a run."
    assert any("x was cut short: 20 of 40 steps" in entry for entry in found.missing)
    assert any("y/norm_ratio.jsonl mixes runs: d = 400 and 900" in entry for entry in found.missing)
    assert "Missing: " in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("content", ["", '{"rates": {"lion"', "[]", '{"rates": {"lion": {}, "sgd": {}}}'])
def test_damaged_results_leave_the_rest_of_the_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "runs" / "rates").mkdir(parents=True)
    (tmp_path / "runs" / "rates" / "rates.json").write_text(content)
    recipe_run(tmp_path / "runs" / "x", "lion", loss=2.0)
    found = rows(tmp_path / "runs", tmp_path / "out")
    (problem,) = found["Figure A3"].problems
    assert "rates" in problem and "To make it again: python -m tools.paper.rate_constants" in problem
    assert found["Figure 3"].findings
    assert "To make it again" in (tmp_path / "out" / "report.html").read_text()


def test_empty_records_of_a_run_are_named(tmp_path: Path) -> None:
    recipe_run(tmp_path / "runs" / "x", "lion", loss=2.0)
    (tmp_path / "runs" / "x" / "norm_ratio.jsonl").write_text("")
    (problem,) = rows(tmp_path / "runs", tmp_path / "out")["Figure 3"].problems
    assert "x/norm_ratio.jsonl holds no round" in problem


def scaling_result(folder: Path, sizes: tuple[float, ...], fitted: int = 0, **more: Any) -> None:
    folder.mkdir(parents=True)
    interval = {"exponent": 0.4, "low": -0.8, "high": 1.6, "holds_half": True}
    fit = {"optimizer": "lion", "iteration": 5, "sizes": fitted or len(sizes), **interval}
    points = [{"d": int(d), "ratio_over_sqrt_d": 0.3, "converged": True} for d in sizes]
    (folder / "scaling.json").write_text(json.dumps({"fits": [fit], "points": points, **more}))
    for name in ("exponent.svg", "ratio_over_sqrt_d.svg"):
        (folder / name).write_text("<svg></svg>")


@pytest.mark.parametrize(
    ("sizes", "said"), [((10**4, 10**5, 10**6), True), ((10**4, 10**4.5, 10**5, 10**5.5, 10**6), False)]
)
def test_a_scaling_study_of_few_sizes_says_so(tmp_path: Path, sizes: tuple[float, ...], said: bool) -> None:
    scaling_result(tmp_path / "runs" / "scaling", sizes)
    (found,) = rows(tmp_path / "runs", tmp_path / "out")["Section 5"].findings
    assert found.missing == (["3 sizes up to 100 times the smallest: intervals this wide show little"] if said else [])


def test_a_fit_without_all_sizes_is_said(tmp_path: Path) -> None:
    scaling_result(tmp_path / "runs" / "scaling", (10**4, 10**4.5, 10**5, 10**5.5, 10**6), fitted=4)
    (found,) = rows(tmp_path / "runs", tmp_path / "out")["Section 5"].findings
    assert found.missing == ["1 of 1 fits lack sizes whose rounds did not converge"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LionError, match="is not a folder: give the one that holds toy/"):
        report.write_report(tmp_path / "none", tmp_path / "out", HARDWARE)
    assert not (tmp_path / "out").exists()


def vision_run(folder: Path, optimizer: str, lr: float, top1: float, losses: tuple[float, ...]) -> None:
    folder.mkdir(parents=True)
    shared = {"model": "resnet18", "optimizer": optimizer, "lr": lr, "epochs": 2, "data": "digits, 9 images", "d": 400}
    lines = [
        shared | {"epoch": epoch, "loss": loss, "top1": top1, "ratio_over_sqrt_d": 0.4}
        for epoch, loss in enumerate(losses, start=1)
    ]
    (folder / "epochs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def grid_of_digits(folder: Path) -> None:
    """Two rates for either optimizer; SGD's larger one diverged."""
    vision_run(folder / "resnet18-lion-0.003", "lion", 3e-3, 0.5, (2.0, 1.9))
    vision_run(folder / "resnet18-lion-0.001", "lion", 1e-3, 0.9, (1.0, 0.5))
    vision_run(folder / "resnet18-sgd-0.001", "sgd", 1e-3, 0.8, (0.9, 0.8))
    shared = {"epochs": 2, "data": "digits, 9 images", "lr": 1e-3}
    lion = {**shared, "top1": 0.9, "tried": {"0.003": 0.5, "0.001": 0.9}}
    sgd = {**shared, "top1": 0.8, "tried": {"0.003": None, "0.001": 0.8}}
    (folder / "grid.json").write_text(json.dumps({"resnet18-lion": lion, "resnet18-sgd": sgd}))


def test_a_grids_best_rates_stand_in_table_a2_and_its_best_runs_in_figure_1(tmp_path: Path) -> None:
    grid_of_digits(tmp_path / "runs" / "vision" / "digits")
    found = rows(tmp_path / "runs", tmp_path / "out")
    (rates,), (curves,) = found["Table A2"].findings, found["Figure 1"].findings
    assert rates.tables[0] == [
        ["learning rate", "resnet18-lion", "resnet18-sgd"],
        ["0.003", "50.00 %", "-"],
        ["0.001", "90.00 % (best)", "80.00 % (best)"],
    ]
    said = "een in one seed: LION's best rate is at most SGD's for 1 of 1 model"
    assert f" S{said}." in rates.verdict and rates.judgements[0].verdict == f"s{said}"
    assert [row[0] for row in curves.tables[0][1:]] == ["resnet18-lion-0.001", "resnet18-sgd-0.001"]
    assert "LION's training loss is lower after 1 of 2 epochs, its top-1 higher after 2" in curves.verdict
    for one in (rates, curves):
        assert one.verdict.startswith("The data set is digits, not the paper's.")
        assert "digits, 9 images" in one.made
        assert UNTUNED not in one.verdict + one.judgements[0].verdict, "the grid searched for the rates"


def test_a_damaged_grid_is_said_and_the_figure_of_its_folder_too(tmp_path: Path) -> None:
    grid_of_digits(tmp_path / "runs" / "vision" / "digits")
    (tmp_path / "runs" / "vision" / "digits" / "grid.json").write_text('{"resnet18-lion": {"lr"')
    found = rows(tmp_path / "runs", tmp_path / "out")
    for name in ("Table A2", "Figure 1"):
        (problem,) = found[name].problems
        assert "grid.json cannot be read" in problem and "To make it again" in problem


def test_gpt_and_bert_stand_beside_each_other_in_section_5(tmp_path: Path) -> None:
    for name, model in (("scaling", {}), ("scaling-bert", {"model": "bert"})):
        scaling_result(tmp_path / "runs" / name, (10**4, 10**5, 10**6), **model)
    findings = rows(tmp_path / "runs", tmp_path / "out")["Section 5"].findings
    assert [one.made.split(" of ")[0] for one in findings] == ["GPTs", "BERTs"]
