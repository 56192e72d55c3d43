"""What only a GPU can show. Each test is skipped without one; tools/gpu_check.sh runs them.

GPU_CHECK_DEVICE=cpu rehearses on a CPU, with few elements in Triton's interpreter, all but the captured graph.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.kernels import self_check
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.step import StepKind
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import lion_update_
from tests.kernel_calls import reference, run
from tests.test_kernels import LANGUAGE, assert_same_bits, problem, with_special_values
from tests.test_packed_kernels import MIXES, compare_packed, packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here (torch.cuda.is_available() is False)")
pytestmark = [] if os.environ.get("GPU_CHECK_DEVICE") == "cpu" else [needs_gpu]
# More elements than the programs that are resident at once have on an H100 (132 x 10 x 1024), or the interpreter's few.
LARGE = 2_200_003 if DEVICE == "cuda" else 1057
FP32, BF16 = torch.float32, torch.bfloat16
# What is stored: parameters, gradients and momentum of one dtype each, remainders, int8.
STORAGES = [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP32, BF16, FP32), (FP32, FP32, BF16), *MIXES]
EVERY_STORAGE = pytest.mark.parametrize("storage", STORAGES, ids=str)


@pytest.fixture(scope="module")
def update() -> Any:
    """The Triton kernel, in Triton's interpreter without a GPU."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:  # Triton looks when a kernel is defined
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        from megatron_lion.kernels.triton_lion import lion_update_triton_
    return lion_update_triton_


@needs_gpu
def test_a_captured_step_follows_what_is_later_written_to_the_learning_rate_and_the_skip_flag() -> None:
    params, grads, _ = problem([4099, 1, 1024], torch.float32, "cuda")
    expected, momenta = [param.clone() for param in params], [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    lr = torch.tensor(1e-3, device="cuda")
    rest = {key: value for key, value in LANGUAGE.items() if key != "lr"}
    lion = ShardedLion(
        params, lr=lr, betas=(rest["beta1"], rest["beta2"]), weight_decay=rest["weight_decay"], kernel="fused"
    )
    lion.skip = torch.ones(1, dtype=torch.int32, device="cuda")
    lion.step()  # compiles, makes the state and copies its addresses to the device, without a change
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lion.step()
    for rate, skipped in ((1e-3, 0), (5e-4, 1), (2e-4, 0)):
        lr.fill_(rate)
        lion.skip.fill_(skipped)
        graph.replay()
        if not skipped:
            reference(expected, grads, momenta, lr=lr.item(), **rest)
    torch.cuda.synchronize()
    assert_same_bits(params, expected)


@pytest.mark.parametrize("size", [1, 1023, 1024, LARGE])
def test_the_compiled_kernel_has_the_bits_of_the_reference(size: int, update: Any) -> None:
    lists = problem([size], torch.float32, DEVICE)
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    for _ in range(2):
        run(update, *lists, **LANGUAGE)
        reference(*expected, **LANGUAGE)
    for actual, right in zip(lists, expected, strict=True):
        assert_same_bits(actual, right)


@EVERY_STORAGE
def test_every_storage_at_a_size_that_fills_the_gpu_has_the_bits_of_the_reference(storage: Any, update: Any) -> None:
    """Programs must run at once to show a race between them, or between warps."""
    lists = with_special_values(problem([LARGE, 1, 31, 1024, 0], FP32, DEVICE))
    call = packed(lists, *storage, copies=storage[0] != BF16)
    compare_packed(update, call, steps=3, grad_scale=0.37)


@pytest.mark.parametrize("storage", [STORAGES[0], ("remainder", BF16, torch.int8)], ids=str)
def test_telemetry_at_that_size_changes_no_bit(storage: Any, update: Any) -> None:
    call = packed(problem([LARGE, 33], FP32, DEVICE), *storage)
    compare_packed(update, call, steps=2, telemetry=Telemetry())


@EVERY_STORAGE
@pytest.mark.parametrize("kernel", ["triton", "foreach", "reference"])
def test_the_gpu_has_the_bits_of_the_reference_on_the_cpu(storage: Any, kernel: str, update: Any) -> None:
    """Compared on the GPU only, a kernel and the reference could share a fault of the device's arithmetic."""
    chosen = {"triton": update, "foreach": lion_update_foreach_, "reference": lion_update_}[kernel]
    here = packed(with_special_values(problem([3001, 33], FP32)), *storage, copies=storage[0] != BF16)
    there = {
        name: [entry.to(DEVICE, copy=True) if torch.is_tensor(entry) else entry for entry in role]
        for name, role in here.items()
    }
    for _ in range(2):
        run(chosen, **there, **LANGUAGE)
        reference(**here, **LANGUAGE)
        for name in here.keys() - {"blocks"}:
            assert_same_bits([tensor.cpu() for tensor in there[name]], here[name])


@pytest.mark.parametrize("remainder", [False, True], ids=["plain", "compact"])
def test_the_self_check_of_auto_passes(remainder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    kind = StepKind(torch.device(DEVICE), FP32, FP32, FP32, BF16)
    if remainder:
        kind = StepKind(torch.device(DEVICE), BF16, BF16, torch.int8, None, torch.int16, BF16)
    numel = self_check.NUMEL if DEVICE == "cuda" else LARGE
    result = self_check.run(self_check.Check(kind, numel, telemetry=DEVICE == "cuda"))
    assert result.passed, result.text
