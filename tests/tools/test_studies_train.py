"""The studies' own runs of Megatron, at the smallest size: what they leave, and that they are kept the next time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tools.paper.{tool}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


def run(tool: str, *arguments: object) -> str:
    done = start(tool, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_rate_constants_trains_evaluates_and_goes_on(tmp_path: Path) -> None:
    text = tmp_path / "test.txt"
    text.write_text("The quick brown fox jumps over the lazy dog .\n" * 50)
    flags = ("--evaluate", text, "--seeds", 1, "--iterations", 8, "--rounds", 2, "--batches", 4, "--output", tmp_path)
    first = run("rate_constants", *flags)
    assert "2/2 sgd-1: " in first and "| c_LION | " in first and "seeds; Lion is below it in all of them" in first
    result = json.loads((tmp_path / "rates.json").read_text())
    assert result["rates"]["lion"]["steps"] == [4, 8]
    assert result["perplexity"]["steps"] == [4, 8]
    assert [len(result["perplexity"][name][0]) for name in ("lion", "sgd")] == [2, 2]
    again = run("rate_constants", *flags)
    assert again.count("2 of 2 runs were complete and were kept") == 2
    assert json.loads((tmp_path / "rates.json").read_text())["rates"] == result["rates"]


@pytest.mark.slow
def test_scaling_study_trains_three_sizes(tmp_path: Path) -> None:
    flags = ("--sizes", 32, 64, 128, "--optimizers", "lion", "--iterations", 4, "--interval", 2, "--batches", 24)
    assert "exponent [95 %]" in run("scaling_study", *flags, "--output", tmp_path)
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert [(point["d"], point["iteration"]) for point in points[:4]] == [
        (39808, 0),
        (39808, 2),
        (39808, 4),
        (128768, 0),
    ]
    assert all(point["d_padding"] == 0 for point in points)


@pytest.mark.slow
def test_scaling_study_trains_berts_of_the_same_text(tmp_path: Path) -> None:
    """One size and few batches: no exponent, which is said, but rounds of a BERT without padded rows, and kept."""
    flags = ("--model", "bert", "--sizes", 32, "--optimizers", "sgd", "--iterations", 2, "--interval", 2)
    for kept in (False, True):
        done = start("scaling_study", *flags, "--batches", 4, "--output", tmp_path)
        assert done.returncode != 0 and "no exponent" in done.stderr
        assert ("1 of 1 runs were complete and were kept" in done.stdout) is kept
    rounds = [json.loads(line) for line in (tmp_path / "sgd-32" / "norm_ratio.jsonl").read_text().splitlines()]
    assert [(one["iteration"], one["d"], one["d_padding"]) for one in rounds] == [(0, 42498, 0), (2, 42498, 0)]
    assert "sop loss" in (tmp_path / "sgd-32" / "log.txt").read_text()
    (corpus,) = (tmp_path / "text").iterdir()
    assert (corpus / "vocab.txt").is_file() and (corpus / "text_train_text_sentence.idx").is_file()
