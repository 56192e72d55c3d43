"""The check of a GPU, on a machine without one: it says so, does nothing, and shellcheck finds no fault in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness import ROOT

SCRIPT = ROOT / "tools" / "gpu_check.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "Nothing was done" in done.stderr
    assert not (tmp_path / "out").exists()


def test_its_help_says_how_the_wheels_are_brought_along_and_a_wrong_flag_is_refused() -> None:
    assert "pip download -d wheels" in run("--help").stdout
    assert (run("--weels").returncode, "--help" in run("--weels").stderr) == (2, True)


def test_shellcheck_finds_nothing() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(checker), str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
