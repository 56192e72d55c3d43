"""The check of a GPU, without one: what is missing is named, parts survive each other, and the whole is rehearsed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.harness import ROOT
from tools.gpu_check import __main__ as check
from tools.gpu_check import environment, pretrain, records, runner, same_losses, summary
from tools.gpu_check.parts import TESTS, Part, all_parts

SCRIPT = ROOT / "tools" / "gpu_check.sh"


def run(*arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "torch cannot be imported: ImportError: libcudart.so.12"),
        ("class version: cuda = None", "torch 9.9 was built without CUDA"),
        (
            "class version: cuda = '13.0'\nclass cuda:\n    is_available = lambda: False\n"
            "    def init(): raise RuntimeError('The NVIDIA driver on your system is too old (found version 11040)')",
            "torch 9.9 (CUDA 13.0) finds no GPU; no NVIDIA driver was found; torch says: The NVIDIA driver on your "
            "system is too old (found version 11040)",
        ),
    ],
    ids=["broken", "without CUDA", "old driver"],
)
def test_without_a_usable_gpu_it_says_why_in_torchs_words_and_runs_nothing(
    tmp_path: Path, torch: str, said: str
) -> None:
    folder = tmp_path / "packages" / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"__version__ = '9.9'\n{torch}\n")
    done = run("--out", str(tmp_path / "out"), PYTHONPATH=str(folder.parent), PATH="/usr/bin:/bin")
    assert (done.returncode, "nothing can be checked here" in done.stderr) == (1, True)
    assert f"missing: {said}" in done.stdout
    text = (tmp_path / "out" / "summary.md").read_text()
    assert f"- **missing**: {said}" in text
    assert "megatron.core, needed by the Megatron runs, cannot be imported" in text
    assert "10 parts were not run" in text


def test_what_triton_needs_at_its_first_launch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    found = [environment.compiler_problem(), environment.header_problem()]
    assert all(problem and not problem.fatal for problem in found)
    assert "neither gcc nor clang is on PATH" in found[0].text
    assert f"{tmp_path}/Python.h does not exist" in found[1].text
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    assert (environment.compiler_problem(), environment.header_problem()) == (None, None)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC=no-such-compiler" in environment.compiler_problem().text


def test_libcuda_must_load_and_be_where_triton_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(environment.ctypes, "CDLL", refuse)
    assert "cannot be loaded (libcuda.so.1: cannot open" in environment.libcuda_problem().text
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: None)
    cache = subprocess.CompletedProcess([], 0, stdout="libc.so.6 => /lib/libc.so.6\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: cache)
    assert "run /sbin/ldconfig" in environment.libcuda_problem().text
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    (tmp_path / "libcuda.so.1").touch()
    assert environment.libcuda_problem() is None


def test_the_drivers_version_is_read_from_the_kernels_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(environment, "DRIVER_FILE", file)
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (dvs-builder@U16)\n",
    ):
        file.write_text(line)
        assert environment.driver_version() == "535.104.05"


def python(name: str, code: str, seconds: float = 20) -> Part:
    return Part(name, seconds, f'-c "{code}"')


HANGS = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=False); "
    "print('child', child.pid, flush=True); time.sleep(60)"
)


def test_a_part_that_fails_hangs_or_prints_a_lot_costs_only_itself(tmp_path: Path, monkeypatch, capsys) -> None:
    parts = [
        python("good", "print('fine')"),
        python("bad", "print('the reason', 3 * 7); raise SystemExit(3)"),
        python("hanging", HANGS, seconds=1.5),
        python("long", "print('x' * 100_000)"),
    ]
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(check, "all_parts", lambda *args: parts)
    monkeypatch.setattr(check.signal, "signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert check.main() == 1
    results = {record["part"]: record["result"] for record in records.read(tmp_path / "rows.jsonl", "part")}
    assert results == {
        "good": "passed",
        "bad": "failed: exit status 3",
        "hanging": "stopped after 2 s",
        "long": "passed",
    }
    text = (tmp_path / "summary.md").read_text()
    assert "**2 of 4 parts passed.**" in text
    assert "## bad: failed: exit status 3\n\n    the reason 21\n" in text
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 30_000
    log = (tmp_path / "log.txt").read_text()
    (child,) = [int(line.split()[1]) for line in log.splitlines() if line.startswith("child ")]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    parts[1:3] = []
    assert check.main() == 0


def test_the_time_for_all_parts_cuts_the_running_one_and_leaves_out_the_rest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    parts = [python("slow", "import time; time.sleep(60)"), python("late", "pass")]
    start = time.monotonic()
    outcomes = list(runner.run_all(parts, tmp_path, dict(os.environ), seconds=1.5))
    assert time.monotonic() - start < 10
    assert [one.result for one in outcomes] == ["stopped after 1 s", "not run: the 2 s for all parts are used up"]


def test_a_check_that_is_ended_ends_its_part_and_leaves_its_rows(tmp_path: Path) -> None:
    """A machine that is lent for a time sends SIGTERM."""
    code = (
        "import sys; from tools.gpu_check import __main__ as check; from tools.gpu_check.parts import Part\n"
        "command = '-c \"' + sys.argv.pop() + '\"'\n"
        "check.all_parts = lambda *args: [Part('quick', 9, '-c pass'), Part('slow', 60, command)]\n"
        "sys.exit(check.main())"
    )
    command = [sys.executable, "-c", code, "--out", str(tmp_path), HANGS]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("== quick: passed"):
            break
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    psutil.wait_procs(children, timeout=10)
    assert children and not any(child.is_running() for child in children)
    assert "**1 of 2 parts passed.**" in (tmp_path / "summary.md").read_text()


def test_parts_on_a_gpu_inherit_no_setting_of_a_cpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEGATRON_LION_DEVICE", "GPU_CHECK_DEVICE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    made = check.environment(True, tmp_path)
    assert not {"MEGATRON_LION_DEVICE", "GPU_CHECK_DEVICE", "TRITON_INTERPRET"} & made.keys()
    assert check.environment(False, tmp_path)["GPU_CHECK_DEVICE"] == "cpu"


def test_only_the_named_parts_run_after_the_environment_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    parts = all_parts(True, tmp_path, tmp_path / "rows", tmp_path)
    names = [part.name for part in parts]
    assert names[:2] == ["wheels", "environment"]
    assert [part.name for part in check.chosen(parts, ["tests"])] == ["wheels", "environment", "tests"]
    assert [part.name for part in check.chosen(parts, None)] == names
    with pytest.raises(SystemExit, match="unknown part 'test'; the parts are wheels, environment, tests"):
        check.chosen(parts, ["test"])


def recorded(*losses: float, name: str = "one", weights: str = "same") -> dict[str, object]:
    return {"name": name, "losses": [loss.hex() for loss in losses], "weights": weights}


@pytest.mark.parametrize(
    ("other", "equal", "said"),
    [
        (recorded(5.25, 4.1), True, "2 losses and the trained weights are equal to the last bit"),
        (recorded(5.25, 4.1000000000000005), False, "the loss of micro-batch 1 differs, 4.1 and 4.1000000000000005"),
        (recorded(5.0, 4.1), False, "the model itself is not reproducible here"),
        (recorded(5.25, 4.1, weights="other"), False, "the weights after the last step differ"),
        (recorded(5.25), False, "2 and 1 losses were recorded"),
    ],
)
def test_two_runs_are_compared_to_the_last_bit(other: dict[str, object], equal: bool, said: str) -> None:
    assert same_losses.compare(recorded(5.25, 4.1), other)[0] is equal
    assert said in same_losses.compare(recorded(5.25, 4.1), other)[1]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((5.0, 4.0), None),
        ((5.0, 5.0), "from 5.0 to 5.0"),
        ((5.0, float("nan"), 4.0), "must be finite"),
        ((), "no loss"),
    ],
)
def test_a_run_passes_if_its_losses_are_finite_and_fall(losses: tuple[float, ...], said: str | None) -> None:
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    problem = pretrain.loss_problem({**recorded(*losses), "first_loss": first, "last_loss": last})
    assert problem is None if said is None else said in str(problem)


def test_a_run_that_recorded_nothing_is_not_equal(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "one.json").write_text(json.dumps(recorded(1.0)))
    monkeypatch.setattr(sys, "argv", ["same_losses", "--work", str(tmp_path), "one", "two"])
    assert same_losses.main() == 1
    assert "nothing to compare, two did not run" in capsys.readouterr().out


def test_a_row_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    records.append(rows, benchmark="2 tensors", name="megatron-lion fused", state="fp32 momentum", milliseconds=2.0)
    records.append(rows, benchmark="2 tensors", name="torch AdamW fused", state="two fp32 moments", milliseconds=5.0)
    records.append(rows, benchmark="2 tensors", name="gone", error="not installed")
    with rows.open("a") as file:
        file.write('{"benchmark": "2 ten')
    text = "\n".join(summary.benchmarks(rows))
    assert "## Optimizer step, 2 tensors" in text
    assert "| megatron-lion fused | fp32 momentum | 2.00 | - | - | - | - | 2.50 | - |" in text
    assert "- not measured: gone: not installed" in text


def test_the_tests_of_every_triton_kernel_of_the_exchange_are_run() -> None:
    uses_triton = re.compile(r"\b(TRITON|EVERY_KERNEL|COMPILED)\b")
    files = [path for path in (ROOT / "tests" / "exchange").glob("test_*.py") if uses_triton.search(path.read_text())]
    assert len(files) >= 3
    assert not [path.name for path in files if f"tests/exchange/{path.name}" not in TESTS]


def test_its_help_says_how_the_wheels_are_brought_along_and_wrong_words_are_refused() -> None:
    assert "pip download -d wheels --no-deps" in run("--help").stdout
    assert (run("--weels").returncode, "--help" in run("--weels").stderr) == (2, True)
    assert "it is cuda (the default) or cpu" in run(GPU_CHECK_DEVICE="gpu").stderr
    done = run(PYTHON="false")
    assert (done.returncode, "must be Python 3.12 or later" in done.stderr) == (1, True)


def test_shellcheck_finds_nothing() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(checker), str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_whole_check_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), timeout=1800, GPU_CHECK_DEVICE="cpu", CUDA_VISIBLE_DEVICES="")
    text = (tmp_path / "summary.md").read_text()
    assert done.returncode == 0, text
    assert "**REHEARSAL on a CPU.**" in text
    assert "fused and reference: 16 losses and the trained weights are equal to the last bit" in text
    assert "compact and compact-reference: 16 losses and the trained weights are equal to the last bit" in text
    assert "- megatron-reference: megatron-lion: " in text
    assert {path.name for path in tmp_path.iterdir()} == {"summary.md", "rows.jsonl", "log.txt"}
