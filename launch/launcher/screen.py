"""The launcher's output: what is only printed, and one line for each step of a run, from the log of its ranks."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from . import progress_line, tail
from .recipes import Recipe

GONE = "megatron-lion: the output is closed: ending the run; waiting until its ranks have saved\n"


def show(text: str) -> None:
    """Print ``text``. A reader that has closed the pipe wants no more of it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard_output()


def follow(process: "subprocess.Popen[bytes]", log: Path, start: int, recipe: Recipe) -> None:
    """Print what ``process`` writes to ``log`` after byte ``start``. Returns when it has ended, or to end it.

    A reader that closes the pipe (``launch.py ... | head``) wants no more of the run: this returns at once, with a
    notice on stderr. Any other output that fails, such as a full disk, only turns off the screen: this then waits for
    ``process``.
    """
    try:
        for text in tail.lines_of(log, start, lambda: process.poll() is not None):
            shown = progress_line.readable(text, recipe)
            _write(text if shown is None else f"{shown}\n")
    except BrokenPipeError:
        _say(GONE)
        _discard_output()
    except OSError as error:
        _say(f"megatron-lion: warning: no more steps are shown ({error}). The run continues; see {log}\n")
        _discard_output()
        process.wait()


def _write(text: str) -> None:
    """Print ``text``. What the screen's encoding lacks becomes a question mark."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the same terminal, or the same full disk
        print(text, end="", file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Send the rest of stdout nowhere, or Python would report its failed flush at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
