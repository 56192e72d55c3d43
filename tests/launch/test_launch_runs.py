"""The recipes' own line on the cpu cluster, for real: a few steps with each optimizer, a preemption, and a resume."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.launcher import commands
from megatron_lion.training_log import read_training_log
from tests.harness import ASYNC_SAVE, as_in_a_terminal, read_checkpoint, run_ranks
from tests.launch.recipe_cases import ROOT, recipe

# So that a run takes seconds; the models, the optimizers and the cluster stay as they are.
SHRUNK = ["gpus-per-node=1", "eval-iters=1", "norm-ratio-batches=2"]
WORKERS = "num-workers=2"  # as the clusters with GPUs have it; a signal reaches them too


def start(text: Path, run: Path, optimizer: str, *overrides: str) -> "subprocess.Popen[str]":
    line = [
        sys.executable,
        str(ROOT / "launch" / "launch.py"),
        "tiny_gpt",
        optimizer,
        "cpu",
        f"data={text}",
        f"run={run}",
    ]
    return subprocess.Popen(
        [*line, *SHRUNK, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=as_in_a_terminal,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def finish(process: "subprocess.Popen[str]", timeout: float = 240.0) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lion", "sgd", "sgd_paper_no_momentum", "adamw"])
def test_the_recipe_runs_and_leaves_what_it_says(text: Path, tmp_path: Path, optimizer: str) -> None:
    steps = ["train-iters=4", "eval-interval=4", "save-interval=4", "norm-ratio-interval=2"]
    output = finish(start(text, tmp_path / "run", optimizer, *steps))
    log = read_training_log(tmp_path / "run" / "log.txt")
    assert sorted(log.loss) == [1, 2, 3, 4]
    assert log.final.keys() == {"validation", "test"}
    assert ("megatron-lion: lion on 28 of 28 parameters" in output) == (optimizer == "lion")
    assert len((tmp_path / "run" / "norm_ratio.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert {"recipe.json", "tensorboard"} < {path.name for path in (tmp_path / "run").iterdir()}


def data_workers(process: "subprocess.Popen[str]") -> int:
    """How many processes of a run read data, by the name that torch gives them."""
    return sum(child.name() == "pt_data_worker" for child in psutil.Process(process.pid).children(recursive=True))


def resume(text: Path, run: Path, *overrides: str, as_users_do: bool) -> None:
    """Run the recipe to its end; if not as users do, its rank is forked with its imports done, which saves 20 s."""
    if as_users_do:
        finish(start(text, run, "lion", *overrides))
        return
    found = recipe("tiny_gpt", "lion", "cpu", f"data={text}", f"run={run}", *SHRUNK, *overrides)
    done = run_ranks(*commands.training_flags(found, []), environment=found.environment)
    assert done.returncode == 0, done.output[-4000:]
    with (run / "log.txt").open("a") as log:
        log.write(done.output)


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_preempted_or_interrupted_saves_at_once_and_the_same_line_goes_on_to_its_end(
    text: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """In a round, after a first save: the round's workers and the server of that save's queue get the signal too."""
    steps = ["train-iters=10", "eval-interval=10", "save-interval=3", "norm-ratio-interval=5", WORKERS]
    process = start(text, tmp_path / "run", "lion", *steps, "norm-ratio-batches=12")
    assert process.stdout is not None
    assert any(line.startswith("step 5/10 | lm loss ") for line in process.stdout)
    while data_workers(process) < 2 * 4:  # of training, validation, test, and the round
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, sent)  # as a terminal does
    process.stdout.read()
    assert process.wait(timeout=120) != 0, "a run that was cut short must not look complete"
    saved = int((tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == 5
    assert max(read_training_log(tmp_path / "run" / "log.txt").loss) == saved

    resume(text, tmp_path / "run", *steps, as_users_do=sent is signal.SIGINT)
    whole = read_training_log(tmp_path / "run" / "log.txt")
    assert sorted(whole.loss) == list(range(1, 11))
    rounds = (tmp_path / "run" / "norm_ratio.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in rounds] == [5, 10]
    assert "test" in whole.final


@pytest.mark.slow
def test_a_run_that_is_preempted_while_it_saves_in_the_background_leaves_both_checkpoints(
    text: Path, tmp_path: Path
) -> None:
    """The process that writes the first one gets the signal too."""
    steps = ["train-iters=12", "lr-warmup-iters=2", "save-interval=3", WORKERS]
    run = tmp_path / "run"
    process = start(text, run, "lion", *steps, "--", *ASYNC_SAVE.split())
    while "scheduled an async checkpoint save at iteration       3 " not in read_if_there(run / "log.txt"):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0, "a run that was cut short must not look complete"
    saved = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 12
    assert max(read_training_log(run / "log.txt").loss) == saved
    for iteration in {3, saved}:
        assert read_checkpoint(run / "checkpoints", iteration)
    resume(text, run, *steps, as_users_do=False)
    assert sorted(read_training_log(run / "log.txt").loss) == list(range(1, 13))


def read_if_there(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_ends_though_what_the_rank_had_started_lives_on(text: Path, tmp_path: Path) -> None:
    """Megatron starts the server of a queue at a rank's first save; it has the rank's output, and outlives it."""
    steps = ["train-iters=4000", "lr-decay-iters=4000", "save-interval=5", WORKERS]
    process = start(text, tmp_path / "run", "lion", *steps)
    assert process.stdout is not None
    assert any(line.startswith("step 8/4000 ") for line in process.stdout)
    below = psutil.Process(process.pid).children(recursive=True)
    next(rank for rank in below if "RANK" in rank.environ()).kill()
    try:
        process.communicate(timeout=60)
        assert process.returncode == 1
        assert any(child.is_running() for child in below)
    finally:
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
