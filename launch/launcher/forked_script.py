"""Run a script as torchrun would, in a process forked from a server that has already imported its modules."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_lion.cli.output_file import append_output_to


def become(script: str, arguments: list[str], output: str, environment: Mapping[str, str]) -> None:
    """Run ``script`` as ``__main__`` with ``environment`` added; both output streams are appended to ``output``."""
    append_output_to(output)
    os.environ.update(environment)
    # A process of the fork server starts its own processes from it too. A script has the platform's default.
    multiprocessing.set_start_method(None, force=True)
    # As Python does for a script: its folder comes first, so that the modules next to it are found.
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
