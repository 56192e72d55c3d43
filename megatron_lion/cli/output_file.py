"""Sends everything that a process prints to a file."""

import os
import sys
from pathlib import Path


def append_output_to(path: str | Path) -> None:
    """Append both output streams of this process to ``path``, also what C code and its own processes print."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
