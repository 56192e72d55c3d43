"""tools/compare_runs.py as it is run: the table's numbers, the figure's files, and what wrong input is told."""

import subprocess
import sys
from pathlib import Path

import compare_runs
import pytest

SCRIPT = Path(compare_runs.__file__)

# As Megatron 0.19.2 prints them.
ITERATION = (
    " [2026-11-23 20:22:33.120767] iteration {at:8}/       6 | consumed samples:            8 | "
    "elapsed time per iteration (ms): {ms} | learning rate: 9.397115E-05 | global batch size:     8 | "
    "lm loss: {loss:E} | loss scale: 1.0 | grad norm: 1.694 | number of skipped iterations:   0 |\n"
)
VALIDATION = " validation loss at iteration {at} | lm loss value: {loss:E} | lm loss PPL: 4.983959E+02 | \n"
FINAL = " validation loss at iteration 6 on {split} set | lm loss value: {loss:E} | lm loss PPL: 4.978287E+02 | \n"


@pytest.fixture
def lion(tmp_path: Path) -> Path:
    """The log of a run that ended."""
    losses = {1: 6.5, 2: 6.25, 3: 6.0, 4: 5.75, 5: 5.5, 6: 5.25}
    text = "".join(ITERATION.format(at=at, ms=10.0 * at**2, loss=loss) for at, loss in losses.items())
    text += VALIDATION.format(at=3, loss=6.1) + VALIDATION.format(at=6, loss=5.3)
    text += FINAL.format(split="validation", loss=5.3125) + FINAL.format(split="test", loss=5.0)
    path = tmp_path / "lion.txt"
    path.write_text(text)
    return path


@pytest.fixture
def sgd(tmp_path: Path) -> Path:
    """The log of a run that was stopped before its first evaluation."""
    path = tmp_path / "sgd.txt"
    path.write_text("".join(ITERATION.format(at=at, ms=40.0, loss=7.0) for at in (1, 2, 3)))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_the_table_holds_each_runs_numbers_and_a_dash_where_one_is_missing(
    lion: Path, sgd: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new folder" / "table.md"
    result = run("--run", f"Lion={lion}", "--run", f"SGD={sgd}", "--table", path)
    assert result.returncode == 0, result.stderr
    table = path.read_text()
    assert table in result.stdout
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header[:3] == ["run", "iterations", "last loss"]
    assert len(header) == len(rule) == 7
    # The perplexity is e^5; the median of 10, 40, 90, 160, 250 and 360 ms is 125.
    assert rows == [
        ["Lion", "6 of 6", "5.2500", "5.3125", "5.0000", "148.4", "125"],
        ["SGD", "3 of 6", "7.0000", "-", "-", "-", "40"],
    ]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_figure_is_written_in_the_format_of_its_suffix(
    lion: Path, sgd: Path, tmp_path: Path, suffix: str, start: bytes
) -> None:
    figure = tmp_path / "new folder" / f"loss{suffix}"
    result = run("--run", f"Lion={lion}", "--run", f"SGD={sgd}", "--figure", figure)
    assert result.returncode == 0, result.stderr
    assert f"figure: {figure}" in result.stdout
    assert figure.read_bytes().startswith(start)


def test_the_figure_draws_each_runs_training_and_validation_losses(
    lion: Path, sgd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    runs = {name: compare_runs.read_training_log(path) for name, path in (("Lion", lion), ("SGD", sgd))}
    compare_runs.draw(runs, tmp_path / "loss.png")
    (axes,) = plt.gcf().axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert drawn == {
        "Lion, training": ([1, 2, 3, 4, 5, 6], [6.5, 6.25, 6.0, 5.75, 5.5, 5.25]),
        "Lion, validation": ([3, 6], [6.1, 5.3]),
        "SGD, training": ([1, 2, 3], [7.0, 7.0, 7.0]),
    }
    colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
    assert colors["Lion, training"] == colors["Lion, validation"] != colors["SGD, training"]
    assert "nats" in axes.get_ylabel()


@pytest.mark.parametrize("value", ["lion.txt", "=lion.txt", "Lion="])
def test_a_run_without_name_or_log_is_told_the_form(value: str) -> None:
    result = run("--run", value)
    assert result.returncode == 2
    assert f"{value!r} is not NAME=LOG, for example Lion=" in result.stderr


def test_a_name_given_twice_is_refused_instead_of_one_run_hiding_the_other(lion: Path, sgd: Path) -> None:
    result = run("--run", f"Lion={lion}", "--run", f"Lion={sgd}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "megatron-lion: error: two runs have the same name; give each its own\n"


def test_a_log_that_is_not_there_is_named_before_anything_is_written(lion: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    result = run("--run", f"Lion={lion}", "--run", f"SGD={tmp_path / 'absent.txt'}", "--table", table)
    assert result.returncode == 2
    assert f"megatron-lion: error: {tmp_path / 'absent.txt'} does not exist" in result.stderr
    assert not table.exists()


def test_a_figure_of_an_unknown_format_is_refused_with_those_that_are_known(lion: Path, tmp_path: Path) -> None:
    result = run("--run", f"Lion={lion}", "--figure", tmp_path / "loss.foo")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert ".png" in result.stderr
