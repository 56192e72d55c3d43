"""Run a script as torchrun would, in a process forked from a server that has already imported its modules."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path


def become(script: str, arguments: list[str], output: str, environment: Mapping[str, str]) -> None:
    """Run ``script`` as ``__main__`` with ``environment`` added; both output streams are appended to ``output``."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    # A process of the fork server starts its own processes from it too. A script has the platform's default.
    multiprocessing.set_start_method(None, force=True)
    # As Python does for a script: its folder comes first, so that the modules next to it are found.
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
