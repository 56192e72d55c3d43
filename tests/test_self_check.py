"""The self-check passes intact kernels, finds broken ones, and keeps its result. Run on a CPU: no GPU is used here."""

import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from megatron_lion.config import LionError
from megatron_lion.kernels import choose, describe, self_check
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.kernels.self_check import Check, Result, problem
from megatron_lion.step import StepKind
from tests import broken_kernels
from tests.kernel_calls import run
from tests.test_kernels import BF16, FP32, LANGUAGE

pytest.importorskip("triton")
with pytest.MonkeyPatch.context() as patch:  # Triton looks when a kernel is defined
    patch.setenv("TRITON_INTERPRET", "1")
    from megatron_lion.kernels.triton_lion import lion_update_triton_

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py checks the real GPU")
CPU = torch.device("cpu")
PLAIN = StepKind(CPU, FP32, FP32, FP32, BF16)
COMPACT = StepKind(CPU, BF16, BF16, torch.int8, None, torch.int16, BF16)
NUMEL = 2047  # of the largest tensor; the problem's other tensors have 11,210 elements
ON_GPU = PLAIN._replace(device=torch.device("cuda", 0))


def difference(kernel, kind, numel=NUMEL, telemetry=False):
    return problem.first_difference(kernel, kind, numel, telemetry=telemetry)


@pytest.mark.parametrize("kind", [PLAIN, COMPACT], ids=["plain", "compact"])
@pytest.mark.parametrize("kernel", [lion_update_foreach_, lion_update_fused_, lion_update_triton_])
def test_intact_kernels_pass(kernel, kind):
    assert difference(kernel, kind, telemetry=kernel is not lion_update_triton_) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PLAIN, COMPACT], ids=["plain", "compact"])
def test_the_triton_kernel_passes_with_telemetry(kind):
    assert difference(lion_update_triton_, kind, telemetry=True) is None


@pytest.mark.slow
def test_the_triton_kernel_passes_with_ten_million_elements():
    assert difference(lion_update_triton_, PLAIN, 10_000_019) is None


TRITON_FAULTS = [
    (
        broken_kernels.writes_out_of_bounds,
        COMPACT,
        r"exp_avgs: element \d+ of the buffer, outside of every tensor: got",
    ),
    (broken_kernels.rounds_toward_zero, PLAIN, r"model_copies\[\d+\]\[\d+\], in a tensor of \d+ elements: got"),
    (broken_kernels.skips_the_tail, PLAIN, r"masters\[0\]\[0\], in a tensor of 1 elements: got .*\(0x.*\), expected"),
    (broken_kernels.uses_a_stale_scale, COMPACT, r"exp_avgs\[\d+\]\[\d+\], in a tensor of \d+ elements: got"),
]
OTHER_FAULTS = [
    (broken_kernels.miscounts, PLAIN, r"step 2: telemetry's zeros: got (\d+), expected"),
    (broken_kernels.changes_gradients, PLAIN, r"step 1: grads\["),
    (broken_kernels.ignores_skip, PLAIN, r"a skipped step: masters\["),
    (broken_kernels.writes_wrong_digits, PLAIN, r"step 3: digits\["),
]


@pytest.mark.parametrize(("kernel", "kind", "said"), TRITON_FAULTS, ids=lambda fault: getattr(fault, "__name__", ""))
def test_a_broken_triton_kernel_is_found(kernel, kind, said, monkeypatch):
    monkeypatch.setattr(broken_kernels, "intact", lion_update_triton_)
    found = difference(kernel, kind)
    assert found is not None
    assert re.search(said, found), found


@pytest.mark.parametrize(("kernel", "kind", "said"), OTHER_FAULTS, ids=lambda fault: getattr(fault, "__name__", ""))
def test_other_faults_are_found(kernel, kind, said):
    assert re.search(said, difference(kernel, kind, telemetry=True))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "_results", {})
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    return tmp_path / "megatron_lion"


def test_a_child_process_checks_once_and_the_result_is_kept(cache, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check = Check(PLAIN, NUMEL, telemetry=False)
    first = self_check.run(check)
    assert first.passed, first.text
    assert re.fullmatch(r"self-checked on the CPU, in Triton's interpreter: 0\.0 M elements, \d+\.\d\d s", first.text)
    assert [path.suffix for path in sorted(cache.iterdir())] == [".json", ".lock"]
    monkeypatch.setattr(self_check, "COMMAND", (sys.executable, "-c", "raise SystemExit('a second child')"))
    assert self_check.run(check) == first


@pytest.mark.slow
def test_a_kernel_that_crashes_ends_only_the_child(cache):
    result = self_check.run(Check(PLAIN, NUMEL, kernel="tests.broken_kernels:crashes"))
    assert result == Result(False, "could not be checked on the CPU, in Triton's interpreter: signal 11 ended it")


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Replaces the child process by a few lines of Python, which note that they have started."""
    log = tmp_path / "started"

    def use(code):
        started = f"open({str(log)!r}, 'a').write('x')\n"
        monkeypatch.setattr(self_check, "COMMAND", (sys.executable, "-S", "-c", started + code))

    def count():
        return len(log.read_text()) if log.exists() else 0

    use(answering(None))
    return use, count


def answering(found):
    answer = {"difference": found, "elements": 2_100_000, "seconds": 0.0625}
    return f"import json; print(json.dumps({answer!r}))"


PASSED = Result(True, "self-checked on the CPU, in Triton's interpreter: 2.1 M elements, 0.06 s")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; time.sleep(60)", "could not be checked .*: it took longer than 0.5 s"),
        (
            "raise RuntimeError('no C compiler')",
            "could not be checked .*: it ended with status 1: RuntimeError: no C",
        ),
        ("import os; os.kill(os.getpid(), 11)", "could not be checked .*: signal 11 ended it"),
        ("print('no JSON')", "could not be checked .*: it ended with status 0"),
        ("print('{}')", "could not be checked .*: it ended with status 0"),
        (
            answering("step 1: masters[3][5]: got 1, expected 2"),
            r"failed its self-check on .*: step 1: masters\[3\]",
        ),
    ],
)
def test_a_child_without_a_good_answer_means_foreach(cache, child, code, said):
    use, count = child
    use(code)
    check = Check(PLAIN, seconds=0.5 if "sleep" in code else 60.0)
    result = self_check.run(check)
    assert not result.passed
    assert re.match(said, result.text), result.text
    assert self_check.run(check) == result, "ranks that waited for this one take its answer"
    assert count() == 1


def test_a_timeout_ends_what_the_child_has_started(cache, child, tmp_path):
    use, _ = child
    use(f"import subprocess; subprocess.run(['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 60'])")
    self_check.run(Check(PLAIN, seconds=2.0))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}") and "Z" not in state_of(pid):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}") or "Z" in state_of(pid)


def state_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[-1].split()[0]
    except OSError:
        return "Z"


def test_a_crash_is_tried_again_later_and_a_difference_is_not(cache, child, monkeypatch):
    use, count = child
    later = time.time() + 3600
    for code, runs in (("raise SystemExit(1)", 2), (answering("step 1: masters[0][0]"), 1)):
        before, check = count(), Check(PLAIN, numel=runs)
        use(code)
        self_check.run(check)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: later)
            self_check.run(check)
        assert count() - before == runs


def cached(cache):
    (path,) = cache.glob("*.json")
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "record": 3}),
        lambda text: json.dumps({**json.loads(text), "expires": "never"}),
        lambda text: json.dumps({**json.loads(text), "record": {"difference": None}}),
        lambda text: json.dumps({**json.loads(text), "key": {**json.loads(text)["key"], "device": "another GPU"}}),
    ],
)
def test_a_damaged_or_foreign_entry_is_made_again(cache, child, damage):
    _, count = child
    assert self_check.run(Check(PLAIN)) == PASSED
    path = cached(cache)
    path.write_text(damage(path.read_text()))
    assert self_check.run(Check(PLAIN)) == PASSED
    assert count() == 2
    assert self_check.run(Check(PLAIN)) == PASSED
    assert count() == 2


def test_an_entry_that_another_user_could_have_written_is_not_read(cache, child):
    _, count = child
    self_check.run(Check(PLAIN))
    cached(cache).chmod(0o666)
    assert self_check.run(Check(PLAIN)) == PASSED
    assert count() == 2


@pytest.mark.parametrize("change", ["_source_hash", "device_name", "setting", "triton", "torch", "kind", "numel"])
def test_another_version_device_or_storage_is_checked_again(cache, child, monkeypatch, change):
    _, count = child
    self_check.run(Check(PLAIN))
    check = Check(PLAIN)
    if change in ("triton", "torch"):
        monkeypatch.setattr(sys.modules[change], "__version__", "0.0")
    elif change == "setting":
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    elif change in ("kind", "numel"):
        check = Check(COMPACT) if change == "kind" else Check(PLAIN, 5)
    else:
        monkeypatch.setattr(self_check, change, lambda *args: "another")
    self_check.run(check)
    assert count() == 2


def test_two_processes_at_once_start_one_child(cache, child):
    use, count = child
    use("import time; time.sleep(0.5); " + answering(None))
    fork = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which these processes do not use
        processes = [fork.Process(target=checks_well) for _ in range(2)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert count() == 1


def checks_well():
    sys.exit(self_check.run(Check(PLAIN)) != PASSED)


@pytest.mark.parametrize("reason", ["no folder", "read-only"])
def test_without_a_folder_to_write_each_start_checks(cache, child, monkeypatch, reason):
    _, count = child
    if reason == "no folder":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such")
    else:  # root may write a read-only folder
        monkeypatch.setattr("tempfile.mkstemp", refuse)
        open_ = os.open
        monkeypatch.setattr(
            os, "open", lambda path, *rest: (refuse if cache in Path(path).parents else open_)(path, *rest)
        )
    for starts in (1, 2):
        assert self_check.run(Check(PLAIN)) == PASSED
        assert count() == starts


def refuse(*args, **kwargs):
    raise PermissionError("read-only")


@pytest.fixture
def on_gpu(monkeypatch, cache):
    """Results of the check as if tensors of ON_GPU were on a GPU, which is not here."""

    def use(result):
        monkeypatch.setattr(self_check, "run", lambda check: result)

    return use


FAILED = Result(False, "failed its self-check on X: step 1: masters[3][5]: got 1 (0x3f800000), expected 2 (0x40000000)")


def test_auto_on_a_gpu_uses_triton_only_after_the_check(on_gpu):
    on_gpu(Result(True, "self-checked on X: 2.1 M elements, 0.06 s"))
    assert describe("auto", [ON_GPU]) == "fused (self-checked on X: 2.1 M elements, 0.06 s)"
    assert choose("auto", ON_GPU) is lion_update_triton_
    for other in (ON_GPU._replace(masters=torch.float64), ON_GPU._replace(grads=torch.float16)):
        assert choose("auto", other) is lion_update_foreach_
        assert describe("auto", [other]) == "foreach"


@pytest.mark.parametrize(("rank", "warned"), [("0", 1), ("1", 0)])
def test_a_failed_check_means_foreach_and_one_warning_per_node(on_gpu, monkeypatch, rank, warned):
    on_gpu(FAILED)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert choose("auto", ON_GPU) is lion_update_foreach_
    assert describe("auto", [ON_GPU]) == f"foreach ({FAILED.text})"
    assert len(caught) == warned
    assert all(FAILED.text in str(warning.message) for warning in caught)


@pytest.mark.parametrize("home", ["none", "read-only"])
def test_without_a_cache_for_triton_the_warning_says_what_to_set(on_gpu, monkeypatch, tmp_path, home):
    on_gpu(Result(False, "could not be checked on X: it ended with status 1: OSError"))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    if home == "read-only":
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(self_check.tempfile, "TemporaryFile", refuse)
    with pytest.warns(RuntimeWarning, match=r"Triton's cache cannot be written .*: set TRITON_CACHE_DIR"):
        choose("auto", ON_GPU)


@pytest.mark.parametrize("kernel", ["foreach", "reference", "fused"])
def test_other_kernels_are_not_checked(monkeypatch, cache, kernel):
    monkeypatch.setattr(self_check, "result_for", lambda kind: pytest.fail("a check"))
    describe(kernel, [ON_GPU])


def test_the_variable_turns_the_check_off_and_auto_is_foreach(monkeypatch, on_gpu):
    on_gpu(Result(True, "never asked"))
    monkeypatch.setenv("MEGATRON_LION_SELF_CHECK", "0")
    assert describe("auto", [ON_GPU]) == "foreach (MEGATRON_LION_SELF_CHECK=0)"
    monkeypatch.setenv("MEGATRON_LION_SELF_CHECK", "off")
    with pytest.raises(LionError, match="MEGATRON_LION_SELF_CHECK 'off' is unknown"):
        choose("auto", COMPACT._replace(device=ON_GPU.device))


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch, on_gpu):
    on_gpu(Result(True, "checked"))
    with monkeypatch.context() as capture:
        capture.setattr(self_check, "_is_capturing", lambda device: True)
        assert choose("auto", ON_GPU) is lion_update_foreach_
    assert choose("auto", ON_GPU) is lion_update_triton_
    with monkeypatch.context() as capture:
        capture.setattr(self_check, "_is_capturing", lambda device: True)
        assert choose("auto", ON_GPU) is lion_update_triton_, "what was decided before holds"


def test_without_a_gpu_or_triton_the_reason_is_named(monkeypatch, cache):
    assert re.match(r"foreach \(no self-check: .+\)", describe("auto", [ON_GPU]))
    monkeypatch.setattr(self_check, "_results", {})
    monkeypatch.setattr(self_check.importlib.util, "find_spec", lambda name: None)
    assert describe("auto", [ON_GPU]) == "foreach (Triton is not installed)"


def test_tensors_that_are_not_contiguous_are_updated():
    """By the reference; other dtypes are refused."""
    lists = [[torch.ones(3, 4).t()], [torch.ones(4, 3)], [torch.zeros(4, 3)]]
    run(lion_update_triton_, *lists, **LANGUAGE)
    assert lists[2][0].unique().numel() == 1 and lists[2][0][0, 0] > 0
    doubles = [[tensor.double().contiguous()] for (tensor,) in lists]
    with pytest.raises(ValueError, match="does not support"):
        run(lion_update_triton_, *doubles, **LANGUAGE)
