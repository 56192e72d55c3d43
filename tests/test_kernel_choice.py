"""``choose`` selects the documented kernel. A kernel requested by name that cannot run is an error, never replaced."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_lion import Lion
from megatron_lion.config import LionError
from megatron_lion.kernels import choose, compiler, describe, fused
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.step import StepKind
from megatron_lion.update import lion_update_

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def kind(*dtypes, device="cpu", **packed):
    return StepKind(torch.device(device), *dtypes, **packed)


PACKED = [{"remainders": torch.int16}, {"scales": BF16}]
PLAIN = kind(FP32, FP32, FP32)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr("megatron_lion.kernels.fused_problem", lambda: "no C++ compiler on PATH")


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, FP32), (FP32, FP32, BF16), (BF16, BF16, BF16)])
def test_fused_is_chosen_on_a_cpu_for_fp32_and_bf16(kernel, dtypes):
    assert choose(kernel, kind(*dtypes)) is lion_update_fused_


STORAGES = [
    (FP64,) * 3,
    (FP32,) * 3,
    (BF16,) * 3,
    (FP16,) * 3,
    (FP32, FP32, FP64),
    (FP32, BF16, FP32),
    (BF16, FP32, FP32),
]


@pytest.mark.parametrize("dtypes", STORAGES)
def test_foreach_is_chosen_for_every_storage_when_asked_for(dtypes):
    assert choose("foreach", kind(*dtypes)) is lion_update_foreach_


@pytest.mark.parametrize("dtypes", [(FP64, FP64, FP64), (FP16, FP16, FP16), (FP32, FP32, FP64), (FP32, FP16, FP32)])
def test_other_dtypes_go_to_foreach_and_are_refused_by_fused(dtypes):
    assert choose("auto", kind(*dtypes)) is lion_update_foreach_
    with pytest.raises(LionError, match="fused kernel cannot be used: it supports fp32 and bf16"):
        choose("fused", kind(*dtypes))


@pytest.mark.parametrize(
    ("kernel", "taken"),
    [("auto", lion_update_fused_), ("foreach", lion_update_foreach_), ("reference", lion_update_)],
)
def test_packed_state_goes_to_the_kernel_asked_for(kernel, taken):
    for packed in PACKED:
        assert choose(kernel, kind(BF16, FP32, FP32, **packed)) is taken
        assert choose(kernel, kind(FP32, FP32, FP32, **packed)) is taken


def test_momentum_in_8_bits_is_fused():
    assert choose("auto", kind(FP32, FP32, torch.int8, scales=BF16)) is lion_update_fused_


@pytest.mark.parametrize(("copy", "taken"), [(BF16, lion_update_fused_), (FP16, lion_update_foreach_)])
def test_only_bf16_model_copies_are_fused(copy, taken):
    assert choose("auto", kind(FP32, FP32, FP32, model_copies=copy)) is taken


def test_packed_state_without_a_compiler_goes_to_foreach(no_compiler):
    for packed in PACKED:
        assert choose("auto", kind(FP32, FP32, FP32, **packed)) is lion_update_foreach_


def test_the_reference_is_chosen_when_asked_for():
    assert choose("reference", PLAIN) is lion_update_


def test_without_a_compiler_auto_falls_back_and_says_so_and_fused_is_refused(no_compiler):
    assert choose("auto", PLAIN) is lion_update_foreach_
    assert describe("auto", [PLAIN]) == "foreach (no C++ compiler on PATH)"
    assert describe("foreach", [PLAIN]) == "foreach"
    with pytest.raises(LionError, match="no C\\+\\+ compiler"):
        choose("fused", PLAIN)


def test_fused_on_a_gpu_without_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_lion.kernels.triton_lion", raising=False)
    with pytest.raises(LionError, match=r"fused kernel cannot be used on a GPU: it needs Triton \(.*Install triton"):
        choose("fused", kind(FP32, FP32, FP32, device="cuda"))


def test_fused_on_a_gpu_refuses_other_dtypes():
    with pytest.raises(LionError, match=r"it supports fp32 and bf16.*got masters torch.float64.*on cuda"):
        choose("fused", kind(FP64, FP64, FP64, device="cuda"))


@pytest.fixture
def gpu():
    """Tensors on "cuda" exist only in name."""
    with FakeTensorMode():
        yield torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "settings", "said"),
    [
        (FP64, {}, "supports fp32 and bf16"),
        (FP16, {}, "supports fp32 and bf16"),
        (FP16, {"master_weights": "fp32"}, r"got masters .*float32.* model_copies torch.float16"),
    ],
)
def test_lion_refuses_what_fused_does_not_support_on_a_gpu_before_the_first_step(gpu, dtype, settings, said):
    with pytest.raises(LionError, match=said):
        Lion([torch.nn.Parameter(torch.ones(3, dtype=dtype, device=gpu))], kernel="fused", **settings)
    Lion([torch.nn.Parameter(torch.ones(3, dtype=dtype, device=gpu))], kernel="reference", **settings)


def test_lion_refuses_parameters_that_are_not_contiguous_with_fused_on_a_gpu(gpu):
    layout = {"memory_format": torch.channels_last, "device": gpu}
    with pytest.raises(LionError, match=r"not contiguous: shape \(2, 3, 4, 5\), strides"):
        Lion([torch.nn.Parameter(torch.empty(2, 3, 4, 5, **layout))], kernel="fused")
    Lion([torch.nn.Parameter(torch.empty(2, 3, 4, 5, device=gpu))], kernel="fused")


def test_lion_refuses_fused_on_a_gpu_without_triton(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_lion.kernels.triton_lion", raising=False)
    monkeypatch.delitem(sys.modules, "megatron_lion.kernels.triton_lion_kernel", raising=False)
    with pytest.raises(LionError, match="Install triton"):
        Lion([torch.nn.Parameter(torch.ones(3, device=gpu))], kernel="fused")


def test_each_kernel_that_runs_is_described_once():
    assert describe("auto", [PLAIN, kind(FP64, FP64, FP64), PLAIN]) == "fused, foreach"
    assert describe("auto", []) == "none"


def test_what_runs_is_described():
    assert [describe(name, [PLAIN]) for name in ("auto", "foreach", "reference")] == [
        "fused",
        "foreach",
        "reference",
    ]
    assert fused.fused_problem() is None


def test_a_kernel_that_is_compiled_in_each_process_is_described_so(monkeypatch):
    monkeypatch.setattr(compiler, "cache_problem", lambda: "/cache is owned or writable by another user")
    said = "fused (compiled for this run only: /cache is owned or writable by another user)"
    assert describe("auto", [PLAIN]) == said
    assert describe("foreach", [PLAIN]) == "foreach"
