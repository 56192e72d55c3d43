"""Processes that a rank starts live through the signal of --exit-signal-handler, however they are started."""

import subprocess
import sys
from pathlib import Path

import pytest

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
