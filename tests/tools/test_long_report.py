"""What the report says of the long runs: differences paired by seed, verdicts with their basis, any subset of runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.tools import long_records_made_up as made_up
from tools.paper import report
from tools.paper.reporting import (
    constant_findings,
    curve_findings,
    gap_findings,
    long_findings,
    perplexity_findings,
    study_runs,
)
from tools.paper.reporting.constant_findings import IN_L1, IN_L2
from tools.paper.studies import plans
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS

EXHIBITS = ("Figure 2", "Figure 3", "Figure A3", "Table A1", "Section 5")
Record = dict[str, Any]
LAST = str(STEPS)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time, and most tests are about numbers."""
    for name in ("long_runs", "constants"):
        monkeypatch.setattr(f"tools.paper.reporting.drawings.{name}", lambda *_: "<svg></svg>")
    monkeypatch.setattr("tools.paper.reporting.size_drawing.draw", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def search() -> list[Record]:
    return made_up.planned("search")


@pytest.fixture(scope="module")
def everything(search: list[Record]) -> list[Record]:
    """Records of all studies and both families."""
    found = [*made_up.planned("paper"), *made_up.planned("paper", "bert"), *search]
    return [*found, *made_up.planned("tuned", records=search), *made_up.planned("sizes", records=search)]


def runs_of(records: list[Record], study: str = "paper", model: str = "gpt") -> study_runs.StudyRuns:
    return study_runs.select(json.loads(json.dumps(records)), study, model)


def of(records: list[Record], *, optimizers: tuple[str, ...] = (), seeds: int = 3) -> list[Record]:
    """Those of the paper study with ``optimizers`` and the first ``seeds``."""
    last = plans.FIRST_SEED + seeds
    return [one for one in records if one["study"] == "paper" and one["optimizer"] in optimizers and one["seed"] < last]


def subset(name: str, everything: list[Record]) -> list[Record]:
    pair, bert = ("lion_paper", "sgd_paper"), [one for one in everything if one["model"] == "bert"]
    gpt = [one for one in everything if one["model"] == "gpt"]
    return {
        "none": [],
        "one Lion run": of(gpt, optimizers=("lion_paper",), seeds=1),
        "both with one seed": of(gpt, optimizers=pair, seeds=1),
        "three SGDs": of(gpt, optimizers=("sgd_paper",)),
        "other seeds": [
            *of(gpt, optimizers=("lion_paper",), seeds=1),
            *(one for one in of(gpt, optimizers=("sgd_paper",)) if one["seed"] > plans.FIRST_SEED),
        ],
        "part of the search": [one for one in gpt if one["study"] == "search"][:3],
        "tuned without a search": [one for one in gpt if one["study"] == "tuned"],
        "one size": [one for one in gpt if one["study"] == "sizes"][:1],
        "the paper's": [one for one in everything if one["study"] == "paper"],
        "BERT": bert,
        "all": everything,
    }[name]


SUBSETS = ("none", "one Lion run", "both with one seed", "three SGDs", "other seeds", "part of the search")
SUBSETS += ("tuned without a search", "one size", "the paper's", "BERT", "all")


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.usefixtures("no_pictures")
def test_any_subset_of_runs_is_a_report(tmp_path: Path, name: str, everything: list[Record]) -> None:
    chosen = subset(name, everything)
    folder = made_up.write(tmp_path / "records", chosen)
    by_exhibit = {exhibit: long_findings.find(exhibit, folder, "a test") for exhibit in EXHIBITS}
    for exhibit, found in by_exhibit.items():
        assert len(found) >= len(long_findings.MAKERS[exhibit]), exhibit
        for one in found:
            assert one.verdict and one.made and "nan" not in one.verdict
            assert all(len(row) == len(table[0]) for table in one.tables for row in table)
            provisional = [judgement.verdict.startswith("provisional: ") for judgement in one.judgements]
            finished = not any("are finished" in entry for entry in one.missing)
            assert not any(provisional) if finished else all(provisional)
            assert all(judgement.basis and judgement.numbers for judgement in one.judgements)
    assert (name == "none") == (not any(one.tables for found in by_exhibit.values() for one in found))
    if name == "all":
        assert not any(one.missing for found in by_exhibit.values() for one in found)
        assert all(one.judgements for found in by_exhibit.values() for one in found)


@pytest.mark.usefixtures("no_pictures")
def test_records_of_finished_runs_make_the_page(tmp_path: Path) -> None:
    records = made_up.finished_pair(tmp_path / "runs", tmp_path / "records")
    rows = report.write_report(tmp_path / "none", tmp_path / "page", "a test", records, EXHIBITS[1:])
    assert not any(row.problems for row in rows)
    gpt, _, _, gap = rows[0].findings
    assert gpt.missing == ["4 of 9 long runs at the paper's rates are finished"]
    assert gpt.verdict.startswith("Provisional: confirmed at the paper's rates (GPT, d = 400, LION at 1e-05 and SGD (")
    main = "- At the paper's rates LION's loss on the fixed training split ends 2.000 (+- 0.000) below that of SGD"
    assert main in (tmp_path / "page" / "report.md").read_text()
    assert gpt.tables[0][1][:4] == ["LION", "2", "4.905 (4.900 to 4.910)", "5.105 (5.100 to 5.110)"]
    assert "learning rates: LION 1e-05 (2 seeds), SGD (momentum 0.9) 0.0001 (2 seeds); 3.0 hours" in gpt.made
    assert "no share of the rate is given, because two seeds with all four runs are needed, 0 finished" in gap.verdict
    page = (tmp_path / "page" / "report.md").read_text()
    assert "**Ours, at the paper's rates.** Provisional: confirmed" in page
    assert "<h4>At the paper&#x27;s rates</h4>" in (tmp_path / "page" / "report.html").read_text()
    assert "ln perplexity per token | LION | " in page
    assert (tmp_path / "page" / "figures" / "figure-3-0-0.svg").is_file()


@pytest.mark.usefixtures("no_pictures")
def test_the_gap_is_of_gpt_only_and_for_both_losses(tmp_path: Path, everything: list[Record]) -> None:
    """BERT's records have losses that are 1 higher, and SGD's best rate halves the gap."""
    folder = made_up.write(tmp_path / "records", everything)
    gap = long_findings.find("Figure 3", folder, "")[-1]
    shares, gains = gap.tables
    # SGD's gap is 2.00, 2.01, 2.02 at the paper's rates and 1 lower at the best.
    assert shares[1][:5] == ["loss on the fixed training split", "2.010 (+- 0.025)", "3", "1.010 (+- 0.025)", "3"]
    assert [row[0] for row in shares[1:]] == [curve_findings.FIXED, curve_findings.VALIDATION]
    assert shares[1][5].startswith("50 % [49, 50]") and shares[1][6] == "50 %, 50 %, 50 %"
    sgd, lion = gains[1:]
    assert sgd[:2] == ["SGD (momentum 0.9)", "0.0001 -> 0.1"] and sgd[3].startswith("1.000")
    assert lion[0] == "LION" and lion[3].startswith("0.000")
    without = [one for one in everything if one["model"] == "gpt"]
    gpt_only = long_findings.find("Figure 3", made_up.write(tmp_path / "gpt", without), "")[-1]
    assert (gpt_only.verdict, gpt_only.tables) == (gap.verdict, gap.tables)


def test_what_else_differs_between_the_studies_is_named(everything: list[Record]) -> None:
    changed = json.loads(json.dumps(everything))
    for one in changed:
        if one["study"] == "tuned":
            one["settings"]["weight-decay"] = 0.0
    paper, tuned = runs_of(changed), runs_of(changed, "tuned")
    found = gap_findings.gap(paper, tuned)
    assert found and "differ in more than the rate: weight-decay 0.01 -> 0.0." in found.verdict


@pytest.mark.usefixtures("no_pictures")
def test_better_throughout_is_asked_at_each_checkpoint_and_of_each_sgd(everything: list[Record]) -> None:
    found = curve_findings.curves(runs_of(everything))
    by_claim = {judgement.claim: judgement for judgement in found.judgements}
    for name in ("SGD (momentum 0.9)", "SGD (no momentum)"):
        one = by_claim[f"LION's loss is below that of {name} throughout, at the paper's rates"]
        assert one.verdict == "confirmed"
        assert one.basis == f"GPT, d = 322,560, LION at 1e-05 and {name} at 0.0001, 50,000 steps, 3 seeds"
    assert "is below in every seed in 50 of 50 windows of 1,000 steps." in found.verdict
    assert found.tables[1][0][2:] == ["seeds", "0", "10k", "20k", "30k", "40k", "50k"]
    assert found.tables[1][1][1:4] == [curve_findings.FIXED, "3", "0.000 (+- 0.000)"]
    assert found.tables[1][2][3] == "-" and found.tables[1][2][4].startswith("2.010 (+- ")
    changed = json.loads(json.dumps(everything))
    for one in of(changed, optimizers=("sgd_paper",)):
        if one["model"] == "gpt":
            one["validation_loss"] |= {"20000": 4.0, "40000": 5.0 + 9.0 * (one["seed"] - plans.FIRST_SEED - 1)}
    late = curve_findings.curves(runs_of(changed))
    mixed = "not confirmed: LION is below in 13 of 15, above in 1, not decided in 1"
    assert [judgement.verdict for judgement in late.judgements[:2]] == [mixed, "confirmed"]
    assert "LION's three losses at 10k, 20k, 30k, 40k, 50k are below in 13 of 15, above in 1" in late.verdict
    assert "an interval that includes 0: validation loss at 40k." in late.verdict
    tuned = curve_findings.curves(runs_of(everything, "tuned"))
    assert any(
        "AdamW throughout, at the best rates of a 5,000-step search (not in the paper)" in j.claim
        for j in tuned.judgements
    )


@pytest.mark.usefixtures("no_pictures")
def test_the_opposite_says_above(everything: list[Record]) -> None:
    records = json.loads(json.dumps(of(everything, optimizers=("lion_paper", "sgd_paper"))))
    measured = ("training_loss", "validation_loss", "exact", "log_perplexity")
    by_run = {(one["model"], one["optimizer"], one["seed"]): {key: one[key] for key in measured} for one in records}
    other = {"lion_paper": "sgd_paper", "sgd_paper": "lion_paper"}
    for one in records:
        one.update(by_run[one["model"], other[one["optimizer"]], one["seed"]])
    losses = curve_findings.curves(runs_of(records))
    assert losses.judgements[0].verdict == "provisional: the opposite is found"
    assert "all three losses of LION are above those of SGD (momentum 0.9)" in losses.verdict
    assert "not decided" not in losses.verdict.lower()
    assert "is above in every seed in 50 of 50 windows of 1,000 steps." in losses.verdict
    perplexity = perplexity_findings.perplexities(runs_of(records))
    assert "LION's checkpoint at 10,000 steps is above that of SGD (momentum 0.9) at 50,000" in perplexity.verdict


@pytest.mark.usefixtures("no_pictures")
def test_one_seed_is_only_seen(everything: list[Record]) -> None:
    records = subset("both with one seed", everything)
    for found in (curve_findings.curves(runs_of(records)), perplexity_findings.perplexities(runs_of(records))):
        assert found.judgements[0].verdict.startswith("provisional: seen in one seed")
        assert found.judgements[0].basis.endswith("one seed") and "confirmed" not in found.verdict.lower()
    constants = constant_findings.constants(runs_of(records))
    assert " in one seed. " in constants.judgements[0].verdict


@pytest.mark.usefixtures("no_pictures")
def test_rounds_that_converged_and_clipped_steps_are_in_the_table(everything: list[Record]) -> None:
    records = [one for one in json.loads(json.dumps(everything)) if one["study"] == "paper"]
    records[0]["rounds"]["converged"][:2] = [True, True]
    records[0]["clipped"]["share"] = 0.2
    found = curve_findings.curves(runs_of(records))
    assert found.tables[-1][1][5:7] == ["2 of 150", "20 to 90 %"]
    assert (
        "r is judged only by exact rounds: 2 of 450 rounds of 100 batches converged (signal-to-noise ratio at least 10"
        in found.verdict
    )
    assert (
        "above clip-grad 1 in this part of the logged steps: LION 20 to 90 %, SGD (momentum 0.9) 90 %" in found.verdict
    )


@pytest.mark.usefixtures("no_pictures")
def test_r_is_also_said_without_the_norm_layers(everything: list[Record]) -> None:
    """One weight of a norm layer with half of the squared l2 norm; the other four weights are equal."""
    records = json.loads(json.dumps(of(everything, optimizers=("lion_paper", "sgd_paper"))))
    for one in records:
        for exact in one["exact"].values():
            exact["kinds"] = {"norm": {"d": 1, "l1": 1.0, "l2": 1.0}, "mlp": {"d": 4, "l1": 2.0, "l2": 1.0}}
    assert curve_findings.curves(runs_of(records)).tables[-1][1][3:5] == ["1.000 to 1.000", "50 %"]


def test_what_the_runs_were_made_with_says_where_seeds_are_shorter(everything: list[Record]) -> None:
    sizes = [one for one in everything if one["study"] == "sizes"]
    assert "SGD (momentum 0.9) 0.1 (2 seeds, 5,000 steps with one seed)" in runs_of(sizes, "sizes").made()
    assert "LION 1e-05 (3 seeds)" in runs_of(everything).made()


@pytest.mark.usefixtures("no_pictures")
def test_a_diverged_run_is_named_and_left_out(everything: list[Record]) -> None:
    records = [one for one in json.loads(json.dumps(everything)) if one["study"] == "paper"]
    records[0]["exact"][LAST]["l1"] = None
    records[1]["training_loss"][LAST] = math.nan
    runs = runs_of(records)
    assert runs.missing == [f"left out, because they diverged: {records[0]['name']}, {records[1]['name']}"]
    assert len(runs.records) == 7 and not runs.provisional
    assert "3 seeds" not in curve_findings.curves(runs).judgements[0].basis


def test_perplexities_are_also_per_byte_and_per_word(everything: list[Record]) -> None:
    found = perplexity_findings.perplexities(runs_of(everything))
    table = found.tables[0]
    assert table[0] == ["test documents", "optimizer", "10k", "20k", "30k", "40k", "50k"]
    assert [row[0] for row in table[1:]] == [words for words in perplexity_findings.VALUES.values() for _ in range(3)]
    assert "ln 2048 = 7.62 here and 10.82 there" in found.verdict
    assert [judgement.verdict for judgement in found.judgements] == [
        "confirmed. With both at 50,000: LION is below"
    ] * 2


def test_constants_are_of_both_sgds_with_the_seeds_range(everything: list[Record]) -> None:
    found = constant_findings.constants(runs_of(everything))
    rows = found.tables[0][1:]
    named = [(row[0], row[1]) for row in rows]
    assert named == [("LION", IN_L1), ("LION", IN_L2), ("SGD (momentum 0.9)", IN_L2), ("SGD (no momentum)", IN_L2)]
    # l1 / sqrt(d) is 0.03 sqrt(322,560) at each of 50 rounds.
    expected = 0.03 * 322_560**0.5 * STEPS**0.25
    assert rows[0][2] == f"{expected:.3f} ({expected:.3f} to {expected:.3f})"
    assert rows[0][3].startswith(f"{expected / 2**0.5:.3f}")  # snr = 1
    assert rows[0][5] == f"{STEPS}, {STEPS}, {STEPS}" and rows[0][-1] == "0 of 150"
    assert all(judgement.verdict.startswith("not established. ") for judgement in found.judgements[:2])


def test_the_search_is_with_the_tuned_runs(tmp_path: Path, search: list[Record]) -> None:
    found = long_findings.find("Figure 3", made_up.write(tmp_path / "records", search), "")
    assert found[0].verdict == "Long runs at the paper's rates: none is finished."
    assert found[1].verdict.startswith("Best learning rates by validation loss (100 batches) at step 5,000")
    assert found[2].missing == ["0 of 9 long runs at the best rates of a 5,000-step search are finished"]


@pytest.mark.slow
def test_the_same_records_give_the_same_page(tmp_path: Path, everything: list[Record]) -> None:
    records, pages = made_up.write(tmp_path / "records", everything), []
    for name in ("a", "b"):
        report.write_report(tmp_path / "none", tmp_path / name, "a test", records, EXHIBITS)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        pages.append([path.read_bytes() for path in files])
    assert pages[0] == pages[1]


def test_checkpoints_are_in_every_made_up_record(everything: list[Record]) -> None:
    measured = {tuple(one["exact"]) for one in everything if one["study"] in ("paper", "tuned")}
    assert measured == {("0", *map(str, CHECKPOINTS))}
