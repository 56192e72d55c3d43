"""tools/paper/rate_constants.py: known constants, repeats averaged, and repeats that do not belong together."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.config import LionError
from tools.paper import rate_constants
from tools.paper.studies import rates

STEPS = (10, 20, 40, 80)


def write(path: Path, factor: float, *, d: int = 400, steps: tuple[int, ...] = STEPS, **more: Any) -> Path:
    """Norms that fall as k^(-1/4), l1 = factor and l2 = factor / 10 at k = 1, after a round before the first step."""
    lines = [{"iteration": 0, "d": d, "l1": 1e9, "l2": 1e9, "converged": True}]
    for step in steps:
        l1 = factor * step**-0.25
        lines.append({"iteration": step, "d": d, "l1": l1, "l2": l1 / 10, "converged": step < 40, **more})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_constants_of_averaged_repeats(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", 30.0), write(tmp_path / "b", 50.0)]
    repeats = {name: rates.read_repeats(name, paths) for name in ("lion", "sgd")}
    found = rates.constants(repeats)
    means = [40 * sum(step**-0.25 for step in STEPS[:n]) / n for n in range(1, 5)]
    expected = max(mean * step**0.25 for mean, step in zip(means, STEPS, strict=True))
    assert found["lion"]["constant"] == pytest.approx(expected / 20)  # sqrt(d) = 20
    assert found["sgd"]["constant"] == pytest.approx(expected / 10)
    assert found["lion"]["l2_constant"] == found["sgd"]["l2_constant"] == found["sgd"]["constant"]
    assert found["lion"]["left"] == pytest.approx(means)
    assert all(
        left <= right * (1 + 1e-12) for left, right in zip(found["lion"]["left"], found["lion"]["right"], strict=True)
    )
    assert (found["lion"]["converged"], found["lion"]["rounds"], found["lion"]["repeats"]) == (4, 8, 2)


def test_a_repeat_that_was_cut_short_or_is_of_another_model_is_named(tmp_path: Path) -> None:
    whole, short = write(tmp_path / "whole", 1.0), write(tmp_path / "short", 1.0, steps=STEPS[:2])
    with pytest.raises(
        LionError, match=r"short has rounds at steps 10, 20, another repeat at 10, 20, 40, 80: was it cut"
    ):
        rates.read_repeats("lion", [short, whole])
    with pytest.raises(LionError, match="other is of another model: d = 500, elsewhere 400"):
        rates.read_repeats("lion", [whole, write(tmp_path / "other", 1.0, d=500)])


def test_epochs_of_the_vision_study_are_exact_and_tell_their_optimizer_and_rate(tmp_path: Path) -> None:
    told = {"epoch": 1, "optimizer": "sgd", "lr": 3e-3}
    paths = [write(tmp_path / name, 1.0, **told) for name in ("a", "b")]
    found = rates.constants({"sgd": rates.read_repeats("sgd", paths)})["sgd"]
    assert found["exact"] and found["lr"] == 3e-3
    assert not rates.read_repeats("sgd", [write(tmp_path / "rounds", 1.0)])["exact"]
    with pytest.raises(LionError, match="a is of sgd, not of lion"):
        rates.read_repeats("lion", paths)
    with pytest.raises(LionError, match=r"several learning rates: 0.003 \(.*a\), 0.001 \(.*c\)"):
        rates.read_repeats("sgd", [paths[0], write(tmp_path / "c", 1.0, **{**told, "lr": 1e-3})])


def test_sgds_rate_goes_to_its_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["rate_constants.py", "--output", str(tmp_path), "--seeds", "1", "--sgd-lr"]
    monkeypatch.setattr(sys, "argv", [*base, "0.01"])
    runs = {run.folder.name: run.flags for run in rate_constants.study_runs(rate_constants.parse(), "")}
    assert "--optimizer lion --lr 0.001 " in runs["lion-1"] and "--optimizer sgd --lr 0.01 " in runs["sgd-1"]
    monkeypatch.setattr(sys, "argv", [*base, "0"])
    with pytest.raises(LionError, match="--sgd-lr 0: a learning rate is above zero"):
        rate_constants.parse()


def test_from_which_step_on_lion_is_below_sgds_last_in_every_seed() -> None:
    lion, sgd = [[5.0, 4.0, 3.0], [4.0, 4.4, 3.5]], [[6.0, 5.5, 4.1], [6.0, 5.0, 4.2]]
    found = rates.early_against_late([10, 20, 30], lion, sgd)
    assert found == {"lion_lower": 1, "seeds": 2, "below_from": 30}
    assert rates.early_against_late([10, 20, 30], sgd, lion)["below_from"] is None


@pytest.mark.parametrize(("rounds", "steps"), [(10, [40, 80, 120, 160, 200]), (5, [40, 80, 120, 160, 200]), (1, [200])])
def test_checkpoints_after_each_fifth_are_evaluated(rounds: int, steps: list[int]) -> None:
    options = argparse.Namespace(iterations=200, rounds=rounds)
    assert rate_constants.evaluated_steps(options) == steps


@pytest.mark.slow
def test_the_command_draws_both_panels_and_refuses_another_optimizer(tmp_path: Path) -> None:
    lion, sgd = write(tmp_path / "lion", 1.0), write(tmp_path / "sgd", 1.0)
    base = [
        sys.executable,
        "-m",
        "tools.paper.rate_constants",
        "--output",
        str(tmp_path / "out"),
        "--run",
        f"lion={lion}",
    ]
    done = subprocess.run([*base, "--run", f"sgd={sgd}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| c_LION | " in done.stdout and "2 of 4" in done.stdout
    assert (tmp_path / "out" / "A3.svg").is_file()
    refused = subprocess.run([*base, "--run", f"adamw={sgd}"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "'adamw' has no rate here" in refused.stderr
