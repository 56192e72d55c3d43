"""The command line: what doctor finds and how it exits, and what a user who types something else is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lion import __version__
from megatron_lion.cli import main

CPU = {"MEGATRON_LION_DEVICE": "cpu"}


def doctor(*, hidden: str = "", tmp_path: Path, **environment: str) -> tuple[int, str]:
    """Exit status and report of ``megatron-lion doctor``, without a GPU and without the package ``hidden``."""
    # Python runs a sitecustomize.py at its start.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {hidden!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if name != "MEGATRON_LION_DEVICE"}
    result = subprocess.run(
        [sys.executable, "-m", "megatron_lion.cli", "doctor"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **environment},
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout


def rows(report: str) -> dict[str, str]:
    """The report's table, without its seams."""
    pairs = (line.split(maxsplit=1) for line in report.splitlines() if not line.startswith((" ", "seam")))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def test_doctor_says_ready_with_versions_device_and_every_seam(tmp_path: Path) -> None:
    status, report = doctor(tmp_path=tmp_path, **CPU)
    assert status == 0, report
    assert report.splitlines()[-1].startswith("READY: --optimizer lion")
    table = rows(report)
    assert table["megatron-lion"] == __version__
    assert table["python"].endswith(f"({sys.prefix})")
    assert table["megatron-core"].startswith("0.19.")
    assert table["megatron.training"] == "there"
    assert table["device"] == "CPU (MEGATRON_LION_DEVICE=cpu)"
    seams = [line.split() for line in report.splitlines() if line.startswith("seam")]
    assert {state for _, state, _ in seams} == {"ok"}
    assert "megatron.core.optimizer.get_megatron_optimizer" in [name for *_, name in seams]


def test_doctor_says_which_lion_each_kind_of_start_would_run(tmp_path: Path) -> None:
    _, report = doctor(tmp_path=tmp_path, hidden="megatron", **CPU)
    starts = [line.strip() for line in report.splitlines() if line.startswith("  ")]
    ours = [line for line in starts if line.endswith("megatron-lion, every parameter")]
    for start in ("torchrun -m megatron_lion.run", "torchrun launch/pretrain_gpt.py", "a script that calls"):
        assert any(line.startswith(start) for line in ours), report


def test_doctor_without_a_gpu_exits_1_and_says_how_to_use_the_cpu(tmp_path: Path) -> None:
    status, report = doctor(tmp_path=tmp_path)
    assert status == 1
    last = report.splitlines()[-1]
    assert last.startswith("NOT READY: no GPU is visible")
    assert last.endswith("set MEGATRON_LION_DEVICE=cpu")
    assert rows(report)["device"] == "no GPU"


def test_doctor_without_megatron_exits_1_and_says_how_to_install_it(tmp_path: Path) -> None:
    status, report = doctor(tmp_path=tmp_path, hidden="megatron", **CPU)
    assert status == 1
    last = report.splitlines()[-1]
    assert last.startswith("NOT READY: megatron-core is not installed")
    assert "pip install 'megatron-core==0.19." in last
    assert rows(report)["megatron-core"] == "missing"


def test_doctor_without_torch_exits_1_and_says_so(tmp_path: Path) -> None:
    status, report = doctor(tmp_path=tmp_path, hidden="torch", **CPU)
    assert status == 1
    assert report.splitlines()[-1].startswith("NOT READY: ")
    assert "torch" in report.splitlines()[-1]


def test_doctor_with_an_old_megatron_exits_1_and_says_which_and_where(tmp_path: Path) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 15\nPATCH = 0\n")
    status, report = doctor(tmp_path=tmp_path, **CPU)
    assert status == 1
    assert report.splitlines()[-1].startswith(f"NOT READY: megatron-core 0.15.0 ({core}) is not supported")
    assert rows(report)["megatron-core"] == f"0.15.0 ({core})"


def test_doctor_with_a_megatron_whose_version_cannot_be_read_exits_1(tmp_path: Path) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    status, report = doctor(tmp_path=tmp_path, **CPU)
    assert status == 1
    assert report.splitlines()[-1].startswith("NOT READY: ")


def test_doctor_with_a_misspelt_device_exits_1_with_the_valid_ones(tmp_path: Path) -> None:
    status, report = doctor(tmp_path=tmp_path, hidden="megatron", MEGATRON_LION_DEVICE="gpu")
    assert status == 1
    assert "NOT READY: MEGATRON_LION_DEVICE 'gpu' is unknown: did you mean 'cpu'? Valid: cpu, cuda" in report


# ---- what else may be typed ----


def typed(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, output and errors of ``megatron-lion`` with ``arguments``."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(("command", "nearest"), [("doktor", "doctor"), ("enabel", "enable"), ("disabled", "disable")])
def test_an_unknown_command_gets_the_nearest_one(
    command: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = typed(command, capsys=capsys)
    assert (status, out) == (2, "")
    assert f"{command!r} is not a command: did you mean {nearest!r}? Valid: disable, doctor, enable" in err
    assert err.count("\n") == 1


def test_no_command_at_all_gets_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = typed(capsys=capsys)
    assert status == 2
    assert "{doctor,enable,disable,rehearse}" in err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("--version", capsys=capsys) == (0, f"megatron-lion {__version__}\n", "")


def test_help_says_what_each_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = typed("--help", capsys=capsys)
    assert status == 0
    commands = {"doctor": "say which Lion", "enable": "let a plain", "disable": "undo"}
    for command, text in commands.items():
        assert any(line.split()[:1] == [command] and text in line for line in out.splitlines()), out


def test_an_environment_that_may_not_be_written_is_named_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no" / "such" / "site-packages"
    monkeypatch.setattr("megatron_lion.hook.pth_path", lambda: missing / "hook.pth")
    assert main(["enable"]) == 2
    assert f"cannot write {missing / 'hook.pth'}: No such file or directory" in capsys.readouterr().err
