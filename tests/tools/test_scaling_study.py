"""tools/paper/scaling_study.py: the exponent of known records, what is left out, and files that are none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.config import LionError
from tools.paper import scaling_study
from tools.paper.studies import scaling
from tools.paper.studies.megatron_runs import FINISHED, MegatronRun

SCRIPT = ("-m", scaling_study.__name__)


def record(iteration: int, d: int, ratio: float, converged: bool | None = True) -> dict[str, Any]:
    numbers = {"loss": 5.0, "ratio_over_sqrt_d": ratio / d**0.5, "snr": 20.0, "batches": 32, "d_padding": 0}
    return {"iteration": iteration, "d": d, "ratio": ratio, "converged": converged, "tokens": 9, **numbers}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def points(folder: Path, exponent: float) -> list[dict[str, Any]]:
    """Five sizes with r = 0.3 d^exponent, off by 1 % to and fro, and an unconverged round at each that is far off."""
    found = []
    for index, d in enumerate((10**4, 10**5, 10**6, 10**7, 10**8)):
        ratio = 0.3 * d**exponent * (1.01 if index % 2 else 0.99)
        path = write(folder / f"{d}.jsonl", record(0, d, ratio), record(10, d, ratio), record(20, d, 1.0, False))
        found += scaling.read_run("lion", path)
    return found


def test_the_exponent_and_its_interval_come_from_converged_rounds_alone(tmp_path: Path) -> None:
    start, trained = scaling.fits(points(tmp_path, 0.43))
    assert (start.optimizer, start.iteration) == (scaling.START, 0)
    assert (trained.optimizer, trained.iteration, trained.sizes) == ("lion", 10, 5)
    assert trained.exponent == pytest.approx(0.43, abs=0.005)
    assert trained.low < 0.43 < trained.high < 0.45
    assert not trained.holds_half
    assert scaling.fits(points(tmp_path, 0.5))[1].holds_half


def test_rounds_before_the_first_step_count_once_for_each_size(tmp_path: Path) -> None:
    found = points(tmp_path, 0.5)
    again = [{**point, "optimizer": "sgd"} if point["iteration"] else dict(point) for point in found]
    together = scaling.unique(found + again)
    assert sum(point["iteration"] == 0 for point in together) == 5
    assert sum(point["iteration"] == 10 for point in together) == 10


def test_mixed_runs_and_rounds_without_a_ratio_are_refused_by_file(tmp_path: Path) -> None:
    mixed = write(tmp_path / "mixed.jsonl", record(0, 100, 5.0), record(10, 200, 5.0))
    with pytest.raises(LionError, match=r"mixed.jsonl mixes runs: it has rounds with d = 100 and 200"):
        scaling.read_run("lion", mixed)
    old = write(tmp_path / "old.jsonl", {"iteration": 3, "d": 5})
    with pytest.raises(LionError, match="iteration 3 has no ratio, converged"):
        scaling.read_run("lion", old)


def test_too_few_converged_sizes_are_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(LionError, match="converged rounds have d = 10000, 100000; add runs"):
        scaling.result(points(tmp_path, 0.5)[:6], "command")


def test_the_command_reads_a_clusters_files_and_writes_tables_and_figures(tmp_path: Path) -> None:
    points(tmp_path, 0.5)
    runs = [part for path in sorted(tmp_path.glob("*.jsonl")) for part in ("--run", f"lion={path}")]
    command = [sys.executable, *SCRIPT, *runs, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| LION | 10 | 5 | 0.500 [" in done.stdout and "| LION | 20 | 10,000 |" in done.stdout
    assert json.loads((tmp_path / "out" / "scaling.json").read_text())["fits"][1]["holds_half"] is True
    assert "before the first step" in (tmp_path / "out" / "exponent.svg").read_text()
    assert (tmp_path / "out" / "ratio_over_sqrt_d.svg").is_file()


def test_a_run_is_kept_only_if_it_ended_with_the_same_flags(tmp_path: Path) -> None:
    run = MegatronRun(folder=tmp_path, flags="--lr 1")
    assert not run.is_finished
    (tmp_path / FINISHED).write_text('{"flags": "--lr')  # killed while it was written
    assert not run.is_finished
    (tmp_path / FINISHED).write_text('{"flags": "--lr 1"}')
    assert run.is_finished
    assert not MegatronRun(folder=tmp_path, flags="--lr 2").is_finished
