"""Megatron-Bridge beside the environment: its wheels in a folder, and runs with them.

The wheels of requirements.txt are fetched from the package index into a folder that later runs of the tests find
again: MEGATRON_LION_TESTS_BRIDGE, by default beside the environment's packages.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_lion.integration.compat.versions import minor_version
from tests.harness import ROOT, Run, torchrun

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
FOLDERS = Path(os.environ.get("MEGATRON_LION_TESTS_BRIDGE", Path(sys.prefix) / "megatron-bridge"))


def packages() -> Path:
    """The folder with the packages of requirements.txt, fetched if it is not there. Skips the test if it cannot be."""
    if minor_version() < "0.19":
        pytest.skip("Megatron-Bridge 0.6.2 needs megatron-core 0.19")
    folder = FOLDERS / hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    FOLDERS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDERS) as fresh:  # moved when it is complete
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{fresh}/packages"]
        done = subprocess.run([*line, "-r", str(REQUIREMENTS)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Megatron-Bridge cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        os.rename(f"{fresh}/packages", folder)
    return folder


def run(script: str, *flags: str, ranks: int = 2) -> Run:
    """Run a script of this folder with Bridge on its path."""
    path = os.pathsep.join([str(ROOT), str(packages()), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return torchrun(*flags, ranks=ranks, script=HERE / script, environment=environment, timeout=600.0)
