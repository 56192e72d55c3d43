"""The command line: what doctor finds and how it exits, and what a user who types something else is told."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_lion import __version__, hook
from megatron_lion.cli import main
from megatron_lion.hook import PTH_NAME
from megatron_lion.integration.compat.versions import resiliency_problem

CPU = {"MEGATRON_LION_DEVICE": "cpu"}


def doctor(*arguments: object, hidden: str = "", tmp_path: Path, **environment: str) -> tuple[int, str]:
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
        [sys.executable, "-m", "megatron_lion.cli", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **environment},
    )
    assert result.stderr == ""
    return result.returncode, result.stdout


def rows(report: str) -> dict[str, str]:
    """The report's table, without indented rows."""
    pairs = (line.split(maxsplit=1) for line in report.splitlines() if not line.startswith(" "))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def test_doctor_says_ready_with_versions_device_and_every_check(tmp_path: Path) -> None:
    status, report = doctor("--verbose", tmp_path=tmp_path, **CPU)
    assert status == 0, report
    assert report.splitlines()[-1].startswith("READY: --optimizer lion")
    table = rows(report)
    assert table["megatron-lion"] == f"{__version__} ({Path(hook.__file__).parent})"
    assert table["python"].endswith(f"({sys.prefix})")
    assert table["megatron-core"].startswith("0.19.")
    assert table["megatron.training"] == "found"
    assert table["device"] == "CPU (MEGATRON_LION_DEVICE=cpu)"
    checks = [line.split()[1] for line in report.splitlines() if line.startswith("  ok ")]
    assert "megatron.core.optimizer.get_megatron_optimizer" in checks
    assert table["compatibility"] == f"all {len(checks)} checks passed"


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
    assert "Set MEGATRON_LION_DEVICE=cpu" in last
    table = rows(report)
    assert table["device"] == "no GPU"
    assert re.fullmatch(r"all \d+ checks passed \(--verbose lists them\)", table["compatibility"])


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
    commands = {"doctor": "report which Megatron", "enable": "make a plain", "disable": "undo"}
    for command, text in commands.items():
        assert any(line.split()[:1] == [command] and text in line for line in out.splitlines()), out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("doctor", "--clustre"), "unknown option --clustre. Flags of a training script come after it"),
        (("doctor", "gone.py"), "gone.py is not a file: pass the path of your training script"),
        (("doctor", __file__, "--cluster"), "--cluster checks the ranks, not a script"),
        (("doctor", "--cluster", "--timeout", "0"), "--timeout 0 and --megabytes 64 must be above 0"),
        (("enable", "now"), "enable takes no arguments, got now"),
    ],
)
def test_a_wrong_command_line_gets_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = typed(*words, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


# ---- a script of the user's ----


def checkout(folder: Path, minor: str) -> Path:
    """A script in a checkout of another Megatron, of which there is no more than a version."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text(f"MAJOR = 0\nMINOR = {minor}\nPATCH = 7\n")
    script = folder / "pretrain_gpt.py"
    script.write_text("from megatron.training import pretrain\n")
    return script


def test_doctor_reports_on_the_megatron_in_the_scripts_folder(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    script = checkout(tmp_path / "Megatron-LM", minor="15")
    status, report = doctor(script, "--optimizer", "lion", tmp_path=tmp_path / "path", **CPU)
    assert status == 1
    assert rows(report)["megatron-core"] == f"0.15.7 ({script.parent / 'megatron' / 'core'})"
    (other,) = [line.split() for line in report.splitlines() if line.startswith("  not used")]
    assert other[2].startswith("0.19.")
    assert report.splitlines()[-1].startswith("NOT READY: megatron-core 0.15.7")


def test_doctor_names_another_megatron_that_only_dash_m_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path / "path", minor="14")
    checkout(tmp_path / "here", minor="15")
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "train.py"
    script.touch()
    monkeypatch.chdir(tmp_path / "here")
    _, report = doctor(script, "--optimizer=lion", tmp_path=tmp_path / "path", **CPU)
    assert rows(report)["megatron-core"].startswith("0.14.7 ")
    core = tmp_path / "here" / "megatron" / "core"
    assert f"  in this folder       torchrun -m megatron_lion.run uses 0.15.7 ({core})" in report.splitlines()


def test_doctor_says_what_a_script_and_its_optimizer_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import megatron_lion\nmegatron_lion.register()\n")
    _, report = doctor(script, "--lr", "1e-4", tmp_path=tmp_path, hidden="megatron", **CPU)
    assert f"  torchrun {script} megatron-lion, every parameter, if the script registers it" in report
    assert "This command's optimizer is adam, so it does not use Lion: add --optimizer lion." in report
    script.write_text("from megatron.training import pretrain\n")
    _, report = doctor(script, "--optimizer", "lion", tmp_path=tmp_path, hidden="megatron", **CPU)
    assert f"  torchrun -m megatron_lion.run {script} megatron-lion, every parameter" in report
    assert "This command's optimizer" not in report


def test_doctor_finds_a_resiliency_extension_that_breaks_megatrons_import(tmp_path: Path) -> None:
    (tmp_path / "nvidia_resiliency_ext").mkdir()  # as 0.4.1 is installed: a namespace without __init__.py
    status, report = doctor(tmp_path=tmp_path, **CPU)
    last = report.splitlines()[-1]
    assert status == 1
    assert last.startswith("NOT READY: megatron-core 0.19.")
    assert f"the installed nvidia-resiliency-ext ({tmp_path / 'nvidia_resiliency_ext'}) lacks" in last
    assert "pip uninstall nvidia-resiliency-ext" in last


def test_a_resiliency_extension_with_a_version_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia_resiliency_ext.py").write_text('__version__ = "0.5.0"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert resiliency_problem() is None


def test_a_resiliency_extension_is_no_problem_once_megatron_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", types.ModuleType("nvidia_resiliency_ext"))
    sys.modules["nvidia_resiliency_ext"].__path__ = []  # type: ignore[attr-defined]
    name = "megatron.core.dist_checkpointing.strategies.torch"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert "cannot be imported" in str(resiliency_problem())
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert resiliency_problem() is None


# ---- enable, where site-packages cannot be written ----


def test_enable_uses_the_users_site_packages_where_the_environments_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_only, users = tmp_path / "no" / "site-packages" / PTH_NAME, tmp_path / "user" / PTH_NAME
    (tmp_path / "no").touch()
    monkeypatch.setattr(hook, "pth_paths", lambda: [read_only, users])
    assert main(["enable"]) == 0
    assert str(users) in capsys.readouterr().out
    assert users.is_file() and hook.is_enabled()
    assert main(["disable"]) == 0
    assert not users.exists() and not hook.is_enabled()


def test_enable_without_a_writable_site_packages_says_what_to_do_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_only = tmp_path / "no" / "site-packages" / PTH_NAME
    (tmp_path / "no").touch()
    monkeypatch.setattr(hook, "pth_paths", lambda: [read_only, read_only])
    assert main(["enable"]) == 2
    error = capsys.readouterr().err
    assert f"cannot write {read_only}: Not a directory. Use `torchrun -m megatron_lion.run SCRIPT` instead" in error
    assert "megatron_lion.register()" in error and "--system-site-packages" in error
