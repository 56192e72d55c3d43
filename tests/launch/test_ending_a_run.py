"""launch.py ends what it started: a shell stands for torchrun, and gets the signals that a terminal sends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.harness import ROOT, as_in_a_terminal

# torchrun's ranks save after SIGTERM only. SIGHUP is what a closed terminal sends.
LAUNCHER = """
trap 'echo interrupted; exit 1' INT HUP
trap 'sleep 0.5; echo saved; exit 3' TERM
echo ready $$
for _ in {1..200}; do sleep 0.1; done
"""
# Lines that look like fields of a step, and a byte that is not UTF-8 and that the screen cannot show.
COMPLETES = """
echo ready $$
echo ' | quality: fine | lm loss: - | lm loss: e | iteration 1/ 2 |'
printf ' loss \\377 |\\n'
echo ' iteration 1/ 2 | elapsed time per iteration (ms): nan | lm loss: 1.2.3 |'
sleep 0.5
echo completed
"""
BROKEN = "progress_line.readable = lambda *_: sys.exit('an error of launch.py itself')"
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
CLOSED = "megatron-lion: the output is closed: ending the run; waiting until its ranks have saved\n"
SCRIPT = """
import sys

from launch.launcher import commands, main, progress_line, recipes

commands.torchrun = lambda *_: ["bash", "-c", {launcher!r}]
{change}
recipe = recipes.resolve("tiny_gpt", "lion", "cpu", ["run={run}"])
sys.exit(main.run_here(recipe, []))
"""


def start(
    run: Path, change: str = "", launcher: str = LAUNCHER, output: int = subprocess.PIPE, encoding: str = "utf-8"
) -> "subprocess.Popen[str]":
    """run_here with the shell as its launcher, as a terminal's foreground job."""
    script = SCRIPT.format(launcher=launcher, run=run, change=change)
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=as_in_a_terminal, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip


def launcher_of(run: Path) -> int:
    """The process id of the shell, once it says that it is ready."""
    log, deadline = run / "log.txt", time.monotonic() + 60
    while not (log.exists() and log.read_text().startswith("ready ")):
        assert time.monotonic() < deadline, "run_here has not started its launcher"
        time.sleep(0.05)
    return int(log.read_text().split()[1])


def is_running(process: int) -> bool:
    """Whether a process still runs. One that has ended may remain as a zombie, because this test is not its parent."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


def test_a_reader_that_closes_the_output_ends_the_run_with_a_save(tmp_path: Path) -> None:
    """launch.py ... | head"""
    read, write = os.pipe()
    os.close(read)
    process = start(tmp_path, output=write)
    os.close(write)
    _, errors = process.communicate(timeout=60)
    assert_saved_and_ended(tmp_path, launcher_of(tmp_path))
    assert process.returncode == 3
    assert errors == CLOSED


def test_an_error_of_launch_py_ends_the_run_too(tmp_path: Path) -> None:
    process = start(tmp_path, BROKEN)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert_saved_and_ended(tmp_path, launcher_of(tmp_path))


def test_a_line_that_cannot_be_read_or_shown_does_not_end_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, launcher=COMPLETES, encoding="ascii")
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert shown.splitlines()[1:] == [
        " | quality: fine | lm loss: - | lm loss: e | iteration 1/ 2 |",
        " loss ? |",
        " iteration 1/ 2 | elapsed time per iteration (ms): nan | lm loss: 1.2.3 |",
        "completed",
    ]


def test_an_output_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    process = start(tmp_path, launcher=COMPLETES, output=full)
    os.close(full)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.startswith("megatron-lion: warning: no more steps are shown ([Errno 28] No space left on device).")
    assert errors.count("\n") == 1
    assert (tmp_path / "log.txt").read_text(errors="replace").endswith("completed\n")


def test_a_second_start_waits_for_the_ranks_also_if_the_first_was_killed(tmp_path: Path) -> None:
    """The launcher that it leaves behind still trains into the folder."""
    first = start(tmp_path)
    launcher = launcher_of(tmp_path)
    first.kill()
    first.communicate(timeout=60)
    second = start(tmp_path, launcher="echo second")
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"in use by another start, process {first.pid} on " in errors
    os.kill(launcher, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while is_running(launcher):
        assert time.monotonic() < deadline, "the orphaned launcher still runs"
        time.sleep(0.05)
    assert (tmp_path / "log.txt").read_text() == f"ready {launcher}\nsaved\n"
    third = start(tmp_path, launcher="echo third")
    shown, errors = third.communicate(timeout=60)
    assert (third.returncode, shown, errors) == (0, "third\n", "")
