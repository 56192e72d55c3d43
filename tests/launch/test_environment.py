"""launch/environment.sh makes the environment again when what is installed changes, and only then."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

# Stands for Python, venv and pip: makes a .venv whose Python has torch.
PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


def make_environment(root: Path) -> str:
    """What the script says for a clone in ``root``."""
    script = (
        f'source "{root}/launch/environment.sh"; find_python() {{ echo "{root}/python"; }}; make_environment "{root}"'
    )
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("file", "before", "after", "again"),
    [
        ("pyproject.toml", '"torch>2.5.1"', '"torch>2.6"', True),
        ("pyproject.toml", '"pytest>=8"', '"pytest>=9"', True),
        ("launch/constraints.txt", "torch==", "torch>=", True),
        ("pyproject.toml", "line-length = 120", "line-length = 100", False),
        ("megatron_lion/version.py", "0.1", "0.2", False),
    ],
)
def test_the_environment_is_made_again_when_what_is_installed_changes(
    tmp_path: Path, file: str, before: str, after: str, again: bool
) -> None:
    for name in (
        "pyproject.toml",
        "setup.py",
        "launch/constraints.txt",
        "launch/environment.sh",
        "megatron_lion/version.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    assert "environment: making" in make_environment(tmp_path)
    assert "environment: reusing" in make_environment(tmp_path)
    changed = (tmp_path / file).read_text().replace(before, after)
    assert changed != (tmp_path / file).read_text()
    (tmp_path / file).write_text(changed)
    assert ("environment: making" in make_environment(tmp_path)) == again


def test_a_python_is_looked_for_without_a_home_folder() -> None:
    script = f'source "{ROOT}/launch/environment.sh"; find_python'
    bash = shutil.which("bash") or "bash"
    line = [bash, "-euo", "pipefail", "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, env={"PATH": "/nowhere"}, check=False)
    assert done.stderr.startswith("No Python 3.12 or 3.13 with venv was found on PATH, in pyenv or in uv.")
