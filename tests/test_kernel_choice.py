"""``choose`` takes the kernel that it says, and a named kernel that cannot be had is an error, not another kernel."""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_lion.config import LionError
from megatron_lion.kernels import choose, compiler, describe, fused
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.update import lion_update_

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def lists(*dtypes):
    return [[torch.ones(3, dtype=dtype), torch.ones(4, dtype=dtype)] for dtype in dtypes]


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr("megatron_lion.kernels.fused_problem", lambda: "no C++ compiler on PATH")


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, FP32), (FP32, FP32, BF16), (BF16, BF16, BF16)])
def test_fused_is_chosen_on_a_cpu_for_fp32_and_bf16(kernel, dtypes):
    assert choose(kernel, *lists(*dtypes)) is lion_update_fused_


@pytest.mark.parametrize(
    ("kernel", "dtypes"),
    [("auto", (FP64, FP64, FP64)), ("foreach", (FP64, FP64, FP64)), ("foreach", (FP32, FP32, FP32))],
)
def test_foreach_is_chosen_for_uniform_tensors(kernel, dtypes):
    assert choose(kernel, *lists(*dtypes)) is lion_update_foreach_


@pytest.mark.parametrize("dtypes", [(FP16, FP16, FP16), (FP32, FP32, FP64), (FP32, FP16, FP32)])
def test_other_dtypes_go_to_the_reference_and_are_refused_by_fused(dtypes):
    assert choose("auto", *lists(*dtypes)) is lion_update_
    with pytest.raises(LionError, match="fp32 and bf16 on the CPU"):
        choose("fused", *lists(*dtypes))


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (BF16, FP32, FP32), (FP32, BF16, FP32)])
def test_foreach_leaves_low_and_mixed_precision_to_the_reference(dtypes):
    """In bf16 foreach would compute in bf16: the learning rate and every product would be rounded to 8 bits."""
    assert choose("foreach", *lists(*dtypes)) is lion_update_


@pytest.mark.parametrize(
    ("kernel", "taken"), [("auto", lion_update_fused_), ("foreach", lion_update_), ("reference", lion_update_)]
)
def test_packed_state_goes_to_fused_or_the_reference(kernel, taken):
    assert choose(kernel, *lists(BF16, FP32, FP32), packed=True) is taken
    assert choose(kernel, *lists(FP32, FP32, FP32), packed=True) is taken


def test_momentum_in_8_bits_is_fused():
    exp_avgs = [tensor.to(torch.int8) for tensor in lists(FP32)[0]]
    assert choose("auto", *lists(FP32, FP32), exp_avgs, packed=True) is lion_update_fused_


def test_packed_state_without_a_compiler_goes_to_the_reference(no_compiler):
    assert choose("auto", *lists(FP32, FP32, FP32), packed=True) is lion_update_


def test_one_parameter_of_another_dtype_sends_the_list_to_the_reference():
    mixed = [[first, second.double()] for first, second in lists(FP32, FP32, FP32)]
    assert choose("auto", *mixed) is lion_update_


def test_the_reference_is_chosen_when_asked_for():
    assert choose("reference", *lists(FP32, FP32, FP32)) is lion_update_


def test_without_a_compiler_auto_falls_back_and_says_so_and_fused_is_refused(no_compiler):
    assert choose("auto", *lists(FP32, FP32, FP32)) is lion_update_foreach_
    assert describe("auto", lists(FP32)[0]) == "foreach (no C++ compiler on PATH)"
    assert describe("foreach", lists(FP32)[0]) == "foreach"
    with pytest.raises(LionError, match="no C\\+\\+ compiler"):
        choose("fused", *lists(FP32, FP32, FP32))


def test_fused_on_a_gpu_without_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_lion.kernels.triton_lion", raising=False)
    on_gpu = [SimpleNamespace(is_cuda=True)]
    with pytest.raises(LionError, match=r"fused kernel cannot be used on a GPU: it needs Triton \(.*Install triton"):
        choose("fused", on_gpu, on_gpu, on_gpu)


def test_what_runs_is_described():
    assert [describe(name, lists(FP32)[0]) for name in ("auto", "foreach", "reference")] == [
        "fused",
        "foreach",
        "reference",
    ]
    assert fused.fused_problem() is None


def test_a_kernel_that_is_compiled_in_each_process_is_described_so(monkeypatch):
    monkeypatch.setattr(compiler, "cache_problem", lambda: "/cache is owned or writable by another user")
    said = "fused (compiled for this run only: /cache is owned or writable by another user)"
    assert describe("auto", lists(FP32)[0]) == said
    assert describe("foreach", lists(FP32)[0]) == "foreach"
