"""The wheel, built and installed as a user would: everything that is needed is in it, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def build_wheel(tmp_path_factory: pytest.TempPathFactory, **environment: str) -> Path:
    """The wheel, built from a copy of the clone, in which the build may leave its folders."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in CLONE.iterdir():
        if path.is_file():
            shutil.copy(path, source)
        elif path.name in ("megatron_lion", "launch", "tools", "tests", "docs"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    line = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", folder)
    run(*line, cwd=source, **environment)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the environment's setuptools."""
    pytest.importorskip("setuptools", minversion="70.1", reason="building without a network needs setuptools here")
    return build_wheel(tmp_path_factory)


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


def assert_complete_metadata(wheel: Path) -> None:
    """The wheel names its version, license, authors, what it needs, and the LICENSE file is in it."""
    with zipfile.ZipFile(wheel) as archive:
        folder = f"megatron_lion-{megatron_lion.__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert {f"{folder}/licenses/LICENSE", f"{folder}/LICENSE"} & set(archive.namelist())
        assert b"megatron-lion = megatron_lion.cli:main" in archive.read(f"{folder}/entry_points.txt")
    header, _, description = metadata.partition("\n\n")
    fields = [line.split(": ", 1) for line in header.splitlines()]
    for field in (
        ["Name", "megatron-lion"],
        ["Version", megatron_lion.__version__],
        ["License", "Apache-2.0"],
        ["Author", "megatron-lion contributors"],
        ["Requires-Python", ">=3.12"],
        ["Classifier", "Programming Language :: Python :: 3.13"],
        ["Description-Content-Type", "text/markdown"],
    ):
        assert field in fields
    (keywords,) = [value for name, value in fields if name == "Keywords"]
    assert {"lion", "optimizer", "megatron-core"} <= set(keywords.split(","))
    needs = [value for name, value in fields if name == "Requires-Dist" and "extra" not in value]
    assert needs == ["torch>2.5.1"]
    extras = {value for name, value in fields if name == "Provides-Extra"}
    assert extras == {"megatron", "train", "tools", "paper", "vision", "test", "gpu"}
    # A package index shows the text without the repository: a relative link would lead nowhere.
    assert description.lstrip().startswith("# megatron-lion\n")
    links = re.findall(r"\]\(([^)]*)\)|(?:href|src)=[\"']([^\"']*)", description)
    assert [link for link in links if not "".join(link).startswith("https://")] == []


def test_the_wheel_says_its_version_license_and_needs(wheel: Path) -> None:
    assert_complete_metadata(wheel)


def test_pre_releases_of_torch_satisfy_the_wheel_and_none_is_fetched() -> None:
    (need,) = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = Requirement(need).specifier
    for version in ("2.6.0", "2.6.0a0+ecf3bae40a.nv25.1", "2.7.0a0+git1234", "2.6.0.dev20250101+cu126", "2.13.0+cpu"):
        assert torch.contains(version, prereleases=True), version
    for version in ("2.5.1", "2.5.1+cu124", "2.5.0a0"):
        assert not torch.contains(version, prereleases=True), version
    assert not torch.prereleases  # with a pre-release in it, pip would take one from an index


@pytest.mark.slow
@pytest.mark.parametrize("setuptools", ["setuptools==70.0.0", "setuptools"], ids=["70.0", "newest"])
def test_the_same_wheel_is_built_with_an_old_and_the_newest_setuptools(
    setuptools: str, wheel: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fetch = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), setuptools]
    if subprocess.run(fetch, capture_output=True).returncode:
        pytest.skip(f"{setuptools} cannot be fetched")
    built = build_wheel(tmp_path_factory, PYTHONPATH=str(tmp_path))
    (version,) = (path.name.split("-")[1].removesuffix(".dist") for path in tmp_path.glob("setuptools-*.dist-info"))
    with zipfile.ZipFile(wheel) as reference, zipfile.ZipFile(built) as archive:
        (generator,) = [name for name in archive.namelist() if name.endswith("/WHEEL")]
        # Before 70.1 setuptools leaves the writing to the package wheel.
        assert re.search(rf"^Generator: (setuptools \({version}\)|bdist_wheel)", archive.read(generator).decode(), re.M)
        for name in reference.namelist():
            if name.startswith("megatron_lion/"):
                assert archive.read(name) == reference.read(name)
    assert_complete_metadata(built)


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
