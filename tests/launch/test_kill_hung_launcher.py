"""launch/kill_hung_launcher.py around shells that stand in for a launcher: it ends one without ranks, and no other."""

import signal
import subprocess
import sys

import pytest

from tests.harness import ROOT

SECONDS = 1.0


def watched(launcher: str) -> "subprocess.Popen[str]":
    line = [sys.executable, str(ROOT / "launch" / "kill_hung_launcher.py"), str(SECONDS), "bash", "-c", launcher]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "launcher",
    [
        "exit 5",
        f"LOCAL_RANK=0 sleep {2 * SECONDS}; exit 5",
        f"for _ in 1 2 3; do LOCAL_RANK=0 sleep {SECONDS / 2}; sleep {SECONDS / 4}; done; exit 5",
    ],
    ids=["ends at once", "has a rank", "starts its rank again"],
)
def test_a_launcher_that_ends_or_has_ranks_is_left_alone(launcher: str) -> None:
    process = watched(launcher)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (5, "", "")


def told_to_end(launcher: str) -> tuple[int, str, str]:
    """Status, output and errors of a launcher that gets SIGTERM once it says that it is ready."""
    process = watched(launcher)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


def test_a_launcher_that_has_no_ranks_any_more_is_killed_with_a_message() -> None:
    launcher = "trap '' TERM INT; echo ready; LOCAL_RANK=0 sleep 0.3; while :; do sleep 0.1; done"
    status, _, errors = told_to_end(launcher)
    assert status == -signal.SIGKILL
    assert f"torchrun has had no rank for {SECONDS:g} s and does not end: killed" in errors


def test_a_signal_reaches_the_launcher() -> None:
    launcher = "trap 'echo saved; exit 3' TERM; echo ready; for _ in {1..100}; do LOCAL_RANK=0 sleep 0.1; done"
    assert told_to_end(launcher) == (3, "saved\n", "")
