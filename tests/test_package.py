"""The wheel, built and installed as a user would: everything that is needed is in it, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import megatron_lion

PACKAGE = Path(megatron_lion.__file__).resolve().parent
CLONE = PACKAGE.parent


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command, which must succeed. Returns what it printed."""
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the clone, in which the build may leave its folders."""
    pytest.importorskip("setuptools", minversion="77", reason="building without a network needs setuptools here")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in CLONE.iterdir():
        if path.is_file():
            shutil.copy(path, source)
        elif path.name in ("megatron_lion", "launch", "tools", "tests", "docs"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", folder, cwd=source)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, is installed."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", target, wheel, cwd=target)
    return target


def run_installed(installed: Path, *arguments: str | Path, cwd: Path) -> str:
    """Run a Python that finds the wheel, and all other packages where they are.

    Without ``-S`` an editable install would answer for a module that the wheel lacks.
    """
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = {"MEGATRON_LION_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join([str(installed), *packages])
    return run(sys.executable, "-S", "-W", "ignore", *arguments, cwd=cwd, PYTHONPATH=path, **environment)


def test_the_wheel_holds_every_module_the_kernels_source_and_the_marker_that_it_is_typed(wheel: Path) -> None:
    modules = {str(path.relative_to(CLONE)) for path in PACKAGE.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert modules - names == set()
    assert {"megatron_lion/py.typed", "megatron_lion/kernels/lion_cpu.cpp"} <= names


def test_the_wheel_holds_no_tests_tools_or_scripts(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
    assert folders == {"megatron_lion", f"megatron_lion-{megatron_lion.__version__}.dist-info"}


def test_the_wheel_says_its_version_licence_and_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"megatron_lion-{megatron_lion.__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    header = metadata.partition("\n\n")[0].splitlines()
    assert f"Version: {megatron_lion.__version__}" in header
    assert any(line.startswith("License") and line.endswith(": Apache-2.0") for line in header)
    assert "Requires-Python: >=3.12" in header
    needs = [line for line in header if line.startswith("Requires-Dist") and "extra" not in line]
    assert {re.split("[<>=]", need.removeprefix("Requires-Dist: "))[0] for need in needs} == {"torch", "megatron-core"}


def test_the_installed_wheel_gives_lion_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    script = (
        "import megatron_lion, torch\n"
        "parameter = torch.nn.Parameter(torch.ones(3))\n"
        "lion = megatron_lion.Lion([parameter], lr=0.5)\n"
        "parameter.sum().backward()\n"
        "lion.step()\n"
        "print(megatron_lion.__file__, *parameter.tolist(), sep='|')"
    )
    file, *values = run_installed(installed, "-c", script, cwd=tmp_path).strip().split("|")
    assert Path(file).resolve().is_relative_to(installed.resolve())
    assert values == ["0.5", "0.5", "0.5"]


def test_the_installed_command_diagnoses_megatron_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    report = run_installed(installed, installed / "bin" / "megatron-lion", "doctor", cwd=tmp_path)
    assert report.splitlines()[-1].startswith("READY: ")
    file = run_installed(installed, "-c", "import megatron_lion.cli as cli; print(cli.__file__)", cwd=tmp_path)
    assert Path(file.strip()).resolve().is_relative_to(installed.resolve())
