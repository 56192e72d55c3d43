"""launch.py ends what it started: a shell stands for torchrun, and gets the signals that a terminal sends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import ROOT, as_in_a_terminal

# torchrun's ranks save after SIGTERM only. SIGHUP is what a closed terminal sends.
LAUNCHER = """
trap 'echo interrupted; exit 1' INT HUP
trap 'sleep 0.5; echo saved; exit 3' TERM
echo ready $$
for _ in {1..200}; do sleep 0.1; done
"""
# Ends the loop of run_here as a reader that goes away does: launch.py ... | head
HEAD = "progress_line.readable = lambda *_: sys.exit('the output is closed')"
# The launcher is ready, and a signal arrives, before Popen has returned to its caller.
EARLY = """
import os, signal, subprocess
from pathlib import Path

def popen(*args, popen=subprocess.Popen, **options):
    process = popen(*args, **options)
    if options.get("start_new_session"):
        while not Path({log!r}).read_text().startswith("ready "):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    return process

subprocess.Popen = popen
"""
NOTICE = "megatron-lion: ending the run; waiting until its ranks have saved\n"
SCRIPT = """
import sys

from launch.launcher import commands, main, progress_line, recipes

commands.torchrun = lambda *_: ["bash", "-c", {launcher!r}]
{change}
recipe = recipes.resolve("tiny_gpt", "lion", "cpu", ["run={run}"])
sys.exit(main.run_here(recipe, []))
"""


def start(run: Path, change: str = "") -> "subprocess.Popen[str]":
    """run_here with the shell as its launcher, as a terminal's foreground job."""
    script = SCRIPT.format(launcher=LAUNCHER, run=run, change=change)
    line = [sys.executable, "-c", script]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal, cwd=ROOT
    )


def launcher_of(run: Path) -> int:
    """The process id of the shell, once it says that it is ready."""
    log, deadline = run / "log.txt", time.monotonic() + 60
    while not (log.exists() and log.read_text().startswith("ready ")):
        assert time.monotonic() < deadline, "run_here has not started its launcher"
        time.sleep(0.05)
    return int(log.read_text().split()[1])


def assert_saved_and_ended(run: Path, launcher: int) -> None:
    """The launcher saved, had no other signal, and ended before run_here did."""
    assert (run / "log.txt").read_text() == f"ready {launcher}\nsaved\n"
    with pytest.raises(ProcessLookupError):
        os.kill(launcher, 0)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
def test_a_signal_to_all_of_a_terminals_job_lets_the_ranks_save_and_waits_for_them(
    tmp_path: Path, sent: signal.Signals
) -> None:
    process = start(tmp_path)
    launcher = launcher_of(tmp_path)
    for _ in range(2):  # the second one, of an impatient user, must not cut the save short
        os.killpg(process.pid, sent)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=30)
    assert_saved_and_ended(tmp_path, launcher)
    assert process.returncode == 3
    assert errors == NOTICE


def test_a_signal_before_the_start_has_returned_lets_the_ranks_save_too(tmp_path: Path) -> None:
    process = start(tmp_path, EARLY.format(log=str(tmp_path / "log.txt")))
    _, errors = process.communicate(timeout=60)
    assert_saved_and_ended(tmp_path, launcher_of(tmp_path))
    assert process.returncode == 3
    assert errors == NOTICE


def test_an_error_while_the_run_is_shown_ends_the_run_too(tmp_path: Path) -> None:
    process = start(tmp_path, HEAD)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert_saved_and_ended(tmp_path, launcher_of(tmp_path))
