"""Packages that a slow test needs beside the environment, fetched into a folder that later runs find again.

The folder is MEGATRON_LION_TESTS_WHEELS, by default one beside the environment's packages.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDERS = Path(os.environ.get("MEGATRON_LION_TESTS_WHEELS", Path(sys.prefix) / "tests-wheels"))


def folder_of(requirements: Path) -> Path:
    """The folder with the packages of ``requirements``, without their dependencies. Skips the test if the package
    index does not answer."""
    folder = FOLDERS / hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    FOLDERS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDERS) as fresh:  # moved when it is complete
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{fresh}/packages"]
        done = subprocess.run([*line, "-r", str(requirements)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{requirements} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        os.rename(f"{fresh}/packages", folder)
    return folder
