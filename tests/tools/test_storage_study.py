"""storage_study.py: Ctrl-C waits for launch.py, for which a script stands that takes a while to save."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.harness import ROOT, as_in_a_terminal

LAUNCH = """
import os, signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(1)
    Path({saved!r}).touch()
    sys.exit(1)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, lambda *_: None)
Path({ready!r}).touch()
time.sleep(60)
"""


def test_ctrl_c_waits_until_the_run_has_saved(tmp_path: Path) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "launch.py").write_text(LAUNCH.format(ready=str(ready), saved=str(saved)))
    script = (
        "import argparse, pathlib\n"
        "from tools.paper import storage_study\n"
        f"storage_study.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        "options = argparse.Namespace(output=storage_study.ROOT, data='', iterations=1, overrides=[])\n"
        "storage_study.train(storage_study.STORAGES[0], 1, options)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal, cwd=ROOT
    )
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline, "the run has not started"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert saved.exists()
