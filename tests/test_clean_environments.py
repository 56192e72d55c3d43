"""Each row of docs/results/clean-environments.md, made again; and the containers' recipes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import clean_environments
from tests.harness import ROOT

CONTAINERS = ROOT / "containers"
NEED_MOUNTS = ("read-only site-packages", "pip install --user", "no HOME", "no HOME, no user")


@pytest.mark.slow
@pytest.mark.parametrize("name", clean_environments.ROWS)
def test_a_clean_environment_runs_the_lion_that_it_says(name: str, tmp_path: Path) -> None:
    if name in NEED_MOUNTS and not clean_environments.can_mount():
        pytest.skip("needs a mount namespace")
    made = clean_environments.ROWS[name](tmp_path / "user")
    assert str(tmp_path) not in clean_environments.section(name, made)


def test_the_recipes_of_both_containers_run_the_same_script_on_a_base_that_the_user_names() -> None:
    dockerfile = (CONTAINERS / "Dockerfile").read_text()
    definition = (CONTAINERS / "megatron-lion.def").read_text()
    assert "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n" in dockerfile and 'containers/install.sh "${MEGATRON}"' in dockerfile
    assert "From: {{ BASE_IMAGE }}\n" in definition and 'containers/install.sh "{{ MEGATRON }}"' in definition
    assert "ARG MEGATRON=megatron-core==0.19.2\n" in dockerfile and "MEGATRON=megatron-core==0.19.2\n" in definition


@pytest.mark.parametrize("checker", ["hadolint", "shellcheck"])
def test_linters_find_nothing_in_the_containers(checker: str) -> None:
    path = shutil.which(checker, path=Path(sys.executable).parent) or shutil.which(checker)
    if not path:
        pytest.skip(f"{checker} is not installed")
    file = CONTAINERS / {"hadolint": "Dockerfile", "shellcheck": "install.sh"}[checker]
    done = subprocess.run([path, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
