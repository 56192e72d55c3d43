"""The long runs at the paper's settings: their command lines, records and phases."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.launcher import estimates, recipes, run_folder
from megatron_lion.config import LionError
from tests.tools.long_records_made_up import finished_pair, run_of, start
from tools.paper import check_round
from tools.paper.long_runs import claimed, state
from tools.paper.studies import frequencies, long_records, long_runs, long_text, plans, run_settings
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS, LongRun


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Records of two seeds of Lion and of SGD with momentum."""
    return finished_pair(tmp_path / "runs", tmp_path / "records")


def test_a_run_is_the_papers_recipe_but_for_size_batch_text_and_device(tmp_path: Path) -> None:
    own = run_of(tmp_path).recipe().settings
    papers = recipes.resolve("gpt2_small", "lion_paper", "cpu", []).settings
    changed = {key for key in own.keys() | papers.keys() if own.get(key) != papers.get(key)}
    size = {*long_runs.SHAPE, *long_runs.BATCH, "vocab-size"}
    files = {"data", "run", "data-cache-path", "vocab-file", "merge-file"}
    files |= {f"{split}-data-path" for split in ("train", "valid", "test")}
    # The first seed is the recipe's.
    assert changed == size | files | {"save-interval", "gpus-per-node"}
    assert (own["lr"], own["lion-beta1"], own["lion-beta2"], own["train-iters"]) == (1e-5, 0.9, 0.95, 50_000)
    assert (own["norm-ratio-batches"], own["norm-ratio-interval"], own["eval-interval"]) == (100, 1000, 10_000)


def test_exact_rounds_are_over_the_fixed_split_without_dropout(tmp_path: Path) -> None:
    first, *others = (one.flags for one in long_runs.exact_rounds(run_of(tmp_path)))
    assert len(others) == len(CHECKPOINTS)
    assert "--ckpt-step" not in first and all("--ckpt-step" in flags for flags in others)
    for flags in (first, *others):
        assert "--norm-ratio-batches all" in flags and "fixed_text_document" in flags
        assert "--hidden-dropout 0.0 --attention-dropout 0.0" in flags


def test_a_run_is_resumed_only_with_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    start(run)
    run_settings.check_folder(run.folder, run.settings())  # also with other --minutes
    monkeypatch.setattr(long_runs, "SHAPE", long_runs.SHAPE | {"num-layers": 4})
    with pytest.raises(LionError, match=r"gpt-lion_paper-1234 has a run with num-layers=2, not 4: remove it, or use"):
        long_runs.train(run, minutes=20)
    start(run, "recipe-2.json")
    with pytest.raises(LionError, match="num-layers=2, not 4"):  # one of its starts
        long_runs.train(run, minutes=20)
    monkeypatch.undo()
    with pytest.raises(LionError, match="num-layers=4, not 2"):
        long_runs.train(run, minutes=20)


def test_a_run_with_other_flags_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    start(run)
    monkeypatch.setattr(long_runs, "FLAGS", (*long_runs.FLAGS, "--no-bias-gelu-fusion"))
    with pytest.raises(LionError, match=r"flags=--rerun-mode .*, not --rerun-mode .* --no-bias-gelu-fusion "):
        long_runs.train(run, minutes=20)


def test_a_record_counts_only_for_a_run_with_its_settings(records: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "runs")
    path = records / f"{run.name}.json"
    run_settings.check_record(path, run.settings())
    one = json.loads(path.read_text())
    one["settings"]["hidden-size"] = 64
    path.write_text(json.dumps(one))
    with pytest.raises(
        LionError, match=r"1234\.json is of a run with hidden-size=64, not 80: remove it, or use another"
    ):
        run_settings.check_record(path, run.settings())


def searched(best: dict[str, float]) -> list[dict[str, Any]]:
    """Records of a search in which ``best`` has the lowest loss of each optimizer."""
    return [
        {
            **{"study": "search", "optimizer": optimizer, "settings": {"lr": rate}},
            "validation_loss": {"1000": 9.0, str(plans.SHORT): 4.0 + (rate != best[optimizer])},
        }
        for optimizer, rates in plans.RATES.items()
        for rate in rates
    ]


BEST = {"lion_paper": 3e-4, "sgd_paper": 3e-1, "adamw": 3e-3}


def test_tuned_runs_have_the_best_rates_of_the_search(tmp_path: Path) -> None:
    texts = {"gpt": long_text.paths(tmp_path, "gpt")}
    search = plans.search(tmp_path, texts, [])
    assert len({run.name for run in search}) == 15 and search[0].recipe()["train-iters"] == plans.SHORT
    found = searched(BEST)
    tuned = plans.tuned(tmp_path, texts, found)
    rates = {run.optimizer: (run.recipe()["lr"], run.recipe()["min-lr"]) for run in tuned}
    assert rates == {"lion_paper": (3e-4, 3e-5), "sgd_paper": (0.3, 0.03), "adamw": (3e-3, 3e-4)}
    assert {run.recipe()["lr-warmup-iters"] for run in tuned} == {500}
    assert {run.recipe()["weight-decay"] for run in [*search, *tuned]} == {0}
    assert len({run.name for run in tuned}) == 9 and all(run.recipe()["train-iters"] == STEPS for run in tuned)


def test_sizes_have_one_schedule_two_seeds_and_seven_of_them_have_every_optimizer(tmp_path: Path) -> None:
    sizes = plans.sizes(tmp_path, {"gpt": long_text.paths(tmp_path, "gpt")}, searched(BEST))
    assert len({run.name for run in sizes}) == len(sizes) == 60
    assert [run.seed for run in sizes] == [1234] * 32 + [1235] * 28
    assert {(run.steps, run.checkpoints) for run in sizes if run.seed == 1235} == {(1000, (1000,))}
    lion = {run.recipe()["lr"] for run in sizes if run.optimizer == "lion_paper"}
    assert sorted(lion) == pytest.approx([BEST["lion_paper"] / 10, BEST["lion_paper"]])
    large = [run for run in sizes if plans.WIDTHS[run.recipe()["hidden-size"]] > plans.LARGE]
    assert {(run.optimizer, run.steps) for run in large} == {("lion_paper", plans.FEW_STEPS)}
    for run in sizes:
        recipe = run.recipe()
        assert estimates.total_parameters(recipe) == plans.WIDTHS[recipe["hidden-size"]]
        assert (recipe["lr-decay-iters"], recipe["lr-warmup-iters"]) == (plans.SHORT, plans.SHORT // 100)


def test_the_search_goes_on_while_the_best_rate_is_at_an_end(tmp_path: Path) -> None:
    texts = {"gpt": long_text.paths(tmp_path, "gpt")}
    found = searched(BEST | {"sgd_paper": 1.0, "adamw": 1e-4})
    added = {run.name for run in plans.search(tmp_path, texts, found)} - {
        run.name for run in plans.search(tmp_path, texts, [])
    }
    assert added == {"gpt-search-3-sgd_paper-1234", "gpt-search-3e-05-adamw-1234"}
    with pytest.raises(LionError, match="2 of 17 runs of --study search are not finished, the next is sgd_paper at 3"):
        plans.best_rates(found)
    found.append(found[0] | {"optimizer": "sgd_paper", "settings": {"lr": 3.0}, "validation_loss": {"5000": math.nan}})
    found.append(found[0] | {"optimizer": "adamw", "settings": {"lr": 3e-5}, "validation_loss": {"5000": 4.5}})
    assert plans.best_rates(found) == BEST | {"sgd_paper": 1.0, "adamw": 1e-4}, "a run that diverged is not chosen"
    with pytest.raises(LionError, match="1 of 17 runs"):
        plans.best_rates(found[1:])


def test_the_loss_of_token_frequencies_is_of_the_training_counts(tmp_path: Path) -> None:
    """Three tokens in training, and one more for each entry of the vocabulary: p = 3 / 2051, 2 / 2051 and 1 / 2051."""
    text = long_text.paths(tmp_path, "gpt")
    text.folder.mkdir()
    np.array([7, 7, 9], dtype=np.uint16).tofile(text.folder / "text_train_text_document.bin")
    np.array([7, 9, 2047], dtype=np.uint16).tofile(text.fixed_split.with_suffix(".bin"))
    expected = math.log(2051) - math.log(3 * 2 * 1) / 3
    assert frequencies.frequency_loss(text) == pytest.approx(expected)


def test_held_out_text_has_nothing_of_the_training_text() -> None:
    sentence = (
        "It was a bright cold day in April, and the clocks were striking thirteen. Winston Smith, his chin nuzzled. "
    )
    training = [
        f"He read aloud: {sentence}Then he stopped.",
        "Another text of the same length that nobody quotes at all.",
    ]
    copied, own = (
        f"As somebody wrote, {sentence}",
        "A paragraph that begins and ends in words which only it has, and is long.",
    )
    assert long_text.without_copies([copied, own, "short"], training) == [own, "short"]


def test_records_are_small_and_hold_what_the_report_needs(records: Path) -> None:
    (path, *_) = records.iterdir()
    assert path.stat().st_size < 8000
    one = long_records.read(records)[0]
    assert (one["name"], one["cpu_hours"], one["training_loss"]["1000"]) == ("gpt-lion_paper-1234", 0.75, 5.0)
    assert one["log_perplexity"]["wikitext"]["10000"] == pytest.approx(5.0, abs=1e-4)
    assert (one["log_word_perplexity"]["held-out"]["50000"], one["bits_per_byte"]["held-out"]["50000"]) == (10.0, 2.5)
    assert one["clipped"] == {"share": 1.0, "mean_norm": 1.5} and one["measure_cpu_hours"] == 0.05
    assert not any(str(value).startswith(str(records.parent)) for value in one["settings"].values())


def test_a_file_that_is_no_record_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(LionError, match=r"x\.json is not a record"):
        long_records.read(tmp_path)


def test_two_processes_do_not_take_one_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, "sgd_paper")
    with claimed(run) as first, claimed(run) as second:
        assert (first, second) == (True, False)
    with claimed(run) as again, run_folder.claimed(run.recipe()):  # launch.py locks the folder for each piece
        assert again
    assert state(run, tmp_path) == "not started"


def test_a_piece_that_saves_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongRun, "command", lambda self, minutes: ["true"])
    with pytest.raises(LionError, match="saved nothing after step 0"):
        long_runs.train(run_of(tmp_path), minutes=50)
    (piece,) = (tmp_path / "gpt-lion_paper-1234" / long_runs.PIECES).read_text().splitlines()
    assert json.loads(piece)["to"] == 0


TINY = {
    **{"log-interval": 5, "eval-iters": 1, "norm-ratio-interval": 10, "norm-ratio-batches": 2},
    **{"num-layers": 1, "seq-length": 16},
}


@pytest.mark.slow
def test_a_run_trains_resumes_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps instead of 50,000, through the launcher and Megatron's loop; a second process finds it finished."""
    from tools.corpus.documents import STANDARD_LIBRARY, python_documents

    monkeypatch.setattr(long_runs, "SAVE_INTERVAL", 10)
    monkeypatch.setattr(long_runs, "BATCH", long_runs.BATCH | TINY)
    for module in (long_runs, long_text):
        monkeypatch.setattr(module, "VOCABULARY", 512)
    monkeypatch.setattr(long_text, "FIXED_SPLIT_MEGABYTES", 0.01)
    monkeypatch.setattr(long_text, "HELD_OUT_MEGABYTES", 0.01)
    source = tmp_path / "documentation.txt"
    source.write_text("\n\n".join(python_documents(STANDARD_LIBRARY / "asyncio")))
    monkeypatch.setattr(long_text.package_text, "build", lambda folder: [source])
    run = LongRun(
        model="gpt",
        optimizer="lion_paper",
        seed=1234,
        output=tmp_path / "runs",
        text=long_text.build(tmp_path / "text", "gpt"),
        steps=20,
        checkpoints=(10, 20),
    )
    long_runs.train(run, minutes=20)
    assert run.last_step == 20
    pieces = (run.folder / long_runs.PIECES).read_text()
    long_runs.train(run, minutes=20)
    assert (run.folder / long_runs.PIECES).read_text() == pieces, "nothing is left to train"
    wikitext = tmp_path / "wiki.test.tokens"
    wikitext.write_text(" = Title = \n\n The quick brown fox jumps over the lazy dog . \n" * 20)
    long_runs.measure(run, {"held-out": run.text.held_out, "wikitext": wikitext})
    one = json.loads(json.dumps(long_records.record(run)))
    assert list(one["exact"]) == ["0", "10", "20"] and one["rounds"]["iteration"] == [10, 20]
    tokens = {entry["tokens"] for entry in one["exact"].values()}
    assert len(tokens) == 1 and tokens.pop() <= one["tokens"]["fixed"]
    assert one["exact"]["0"]["loss"] != one["exact"]["20"]["loss"]
    assert set(one["log_perplexity"]) == {"held-out", "wikitext"}
    assert list(one["validation_loss"]) == ["4", "8", "12", "16", "20"]
    words = ["check_round", "--run", str(run.folder), "--data", str(run.text.fixed_split), "--step", "20"]
    monkeypatch.setattr("sys.argv", words)
    assert check_round.main() == 0, "equal to float64 autograd of another model"
    record = run.folder / "exact-20" / "norm_ratio.jsonl"
    measured = json.loads(record.read_text())
    record.write_text(json.dumps(measured | {"l1": measured["l1"] * (1 + 1e-5)}) + "\n")
    assert check_round.main() == 1
    monkeypatch.setattr("sys.argv", [*words[:-1], "10000"])
    with pytest.raises(LionError, match="exact-10000"):
        check_round.main()
