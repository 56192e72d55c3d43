"""Processes that a rank starts live through the signal of --exit-signal-handler, however they are started."""

import argparse
import contextlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lion.integration.checkpoint import integrity

# In an interpreter that has started nothing: Python's resource tracker is then started with the first of these.
SCRIPT = """
import argparse, multiprocessing, os, signal, sys, time
from megatron_lion.integration.exit_signal import processes_live_through_it

def answer(connection):
    connection.send("ready")
    connection.send(connection.recv())

if __name__ == "__main__":
    args = argparse.Namespace(exit_signal_handler={handled})
    context = multiprocessing.get_context("{method}")
    here, there = context.Pipe()
    with processes_live_through_it(args):
        server = context.Manager()
        child = context.Process(target=answer, args=(there,))
        child.start()
        there.close()
        assert (signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())) == {handled}
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert here.recv() == "ready"
    for process in (child.pid, server._process.pid):
        os.kill(process, signal.SIGTERM)
    time.sleep(0.3)
    try:
        here.send("alive")
        print(here.recv() if here.poll(5) else "ended", len(server.list([1])))
    except (EOFError, ConnectionError):
        print("ended")
    child.kill()
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("handled", [True, False])
def test_a_process_lives_through_the_signal_only_where_the_rank_handles_it(
    tmp_path: Path, method: str, handled: bool
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(method=method, handled=handled))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == ("alive 1\n" if handled else "ended\n"), done.stderr


# The last of what a failing rank does: its daemons ignore SIGTERM, as Megatron's data workers do.
FAILING = """
import argparse, multiprocessing, os, signal
from megatron_lion.integration import exit_signal

def wait(connection):
    {deafen}
    connection.send(os.getpid())
    signal.pause()

exit_signal.kill_daemons_at_exit(argparse.Namespace(exit_signal_handler=True))
context = multiprocessing.get_context("fork")
here, there = context.Pipe()
with exit_signal.processes_live_through_it(argparse.Namespace(exit_signal_handler={blocked})):
    context.Process(target=wait, args=(there,), daemon=True).start()
print(here.recv(), flush=True)
raise RuntimeError("failed on purpose")
"""


@pytest.mark.parametrize(
    ("deafen", "blocked"),
    [("signal.signal(signal.SIGTERM, lambda *_: None)", False), ("pass", True)],
    ids=["handled, as by Megatron's data workers", "blocked, as by a round's"],
)
def test_a_process_that_fails_does_not_wait_for_daemons_that_live_through_sigterm(deafen: str, blocked: bool) -> None:
    script = FAILING.format(deafen=deafen, blocked=blocked)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: failed on purpose")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.parametrize("saves_in_background", [True, False])
def test_a_step_guards_processes_only_if_a_save_may_be_running(
    monkeypatch: pytest.MonkeyPatch, saves_in_background: bool
) -> None:
    """Megatron asks before each step, and the guard writes to a pipe."""
    guarded = []

    @contextlib.contextmanager
    def guard(args: argparse.Namespace) -> Iterator[None]:
        guarded.append(args)
        yield

    args = argparse.Namespace(async_save=saves_in_background)
    monkeypatch.setitem(sys.modules, "megatron.training", types.SimpleNamespace(get_args=lambda: args))
    monkeypatch.setattr(integrity.exit_signal, "processes_live_through_it", guard)
    assert integrity.maybe_finalize_async_save(lambda *, blocking: blocking, blocking=False) is False
    assert guarded == [args] * saves_in_background
