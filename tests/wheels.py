"""Packages outside the environment, fetched from the package index into folders that later runs find again.

They are in MEGATRON_LION_TESTS_WHEELS, by default ``megatron-wheels`` in the environment's folder.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDERS = Path(os.environ.get("MEGATRON_LION_TESTS_WHEELS", Path(sys.prefix) / "megatron-wheels"))


def of_requirements(file: Path) -> Path:
    """The folder with the packages of a requirements file, as :func:`fetched`."""
    return fetched(hashlib.sha256(file.read_bytes()).hexdigest()[:12], "-r", str(file))


def fetched(name: str, *what: str) -> Path:
    """The folder ``name`` with the packages ``what`` for pip, without those that they depend on.

    Skips the test if they cannot be fetched.
    """
    folder = FOLDERS / name
    if folder.is_dir():
        return folder
    FOLDERS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDERS) as fresh:  # moved when it is complete
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{fresh}/packages", *what]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(what)} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        os.rename(f"{fresh}/packages", folder)
    return folder
