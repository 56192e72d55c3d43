"""tools/norm_ratio_figure.py: unconverged rounds look different, and a file that is none is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import norm_ratio_figure
import pytest

SCRIPT = Path(norm_ratio_figure.__file__)


def record(iteration: int, converged: bool | None, ratio: float | None = 80.0) -> dict[str, Any]:
    over = None if ratio is None else ratio / 100
    numbers = {"loss": 5.0, "ratio": ratio, "ratio_over_sqrt_d": over, "snr": 12.5, "d": 10_000, "batches": 20}
    return {"iteration": iteration, "converged": converged, **numbers}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_figure_shows_unconverged_rounds_as_open_circles_and_both_reference_lines(tmp_path: Path) -> None:
    mixed = write(tmp_path / "mixed.jsonl", record(0, True), record(10, False), record(20, False), record(30, None))
    figure = tmp_path / "figure.svg"
    result = run("--run", f"Lion={mixed}", "--figure", figure)
    assert result.returncode == 0, result.stderr
    drawn = figure.read_text()
    upper = drawn.split('id="axes_2"')[0]
    assert len(re.findall(r"<use [^>]*fill: #ffffff", upper)) == 3 + 1  # the points and the legend's
    assert "Lion, not converged" in drawn
    assert "noise alone" in drawn
    assert "d = 10,000" in drawn
    assert "| Lion | 10 | 20 | 5.0000 | 80.00 | 0.8000 | 12.50 | no |" in result.stdout


def test_a_round_without_a_number_is_left_out_of_the_figure_and_a_dash_in_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record(0, None, ratio=None), record(10, True))
    result = run("--run", f"SGD={path}", "--figure", tmp_path / "figure.png")
    assert result.returncode == 0, result.stderr
    assert "| SGD | 0 | 20 | 5.0000 | - | - | 12.50 | - |" in result.stdout
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("", "holds no round"), ("loss 2\nloss 1\n", "is no norm_ratio")]
)
def test_a_file_without_rounds_is_refused_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "norm_ratio.jsonl"
    if content is not None:
        path.write_text(content)
    result = run("--run", f"Lion={path}", "--figure", tmp_path / "figure.png")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "figure.png").exists()
