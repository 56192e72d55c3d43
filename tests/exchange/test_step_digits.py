"""A step leaves the digits with which other ranks, who have only the model's old parameters, make the same step."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_lion.exchange.digits import EXCEPTION
from megatron_lion.exchange.message import Run, WireFormat
from megatron_lion.kernels import choose, foreach
from megatron_lion.kernels import digits as passes
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.precision import BlockLayout, quantize, split_master
from megatron_lion.step import LionUpdate, StepKind, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import lion_update_
from tests.exchange.exchange_cases import BF16, CPU, DEVICE, FP16, FP32, TRITON, messages_of, same_bits, special_values

if TRITON is not None:  # in its interpreter, as exchange_cases has imported it
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        from megatron_lion.kernels.triton_lion import lion_update_triton_
        from megatron_lion.kernels.triton_lion_table import launch_table

LR, WEIGHT_DECAY = 3e-3, 0.1
ONE_PASS = ["fused", *(["triton"] if TRITON is not None else [])]
SIZES = (700, 1, 0, 1299)
STORAGES = ["fp32", "bf16 copies", "fp16 copies", "remainders", "remainders, int8 momentum", "bf16 gradients"]


def chosen(kernel: str, kind: StepKind) -> LionUpdate:
    """The update of ``kernel``, also Triton's on a CPU."""
    return lion_update_triton_ if kernel == "triton" else choose(kernel, kind, digits=True)


def device_of(kernel: str) -> str:
    return DEVICE if kernel == "triton" else "cpu"


def on(device: str, tensors: StepTensors) -> StepTensors:
    """``tensors``, or copies of them on a GPU."""
    if device == "cpu":
        return tensors
    lists = {**tensors.roles(), "digits": tensors.digits}
    moved = {name: [tensor.to(device) for tensor in role] for name, role in lists.items()}
    return StepTensors(**moved, blocks=tensors.blocks)


def step(storage: str, *, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> StepTensors:
    """A step on parameters of ``sizes``, with the digits of all in one buffer."""
    generator = torch.Generator().manual_seed(seed)
    masters, grads, exp_avgs = ([torch.randn(size, generator=generator) * 0.02 for size in sizes] for _ in range(3))
    grads[0][:90] = exp_avgs[0][:90] = 0.0  # sign 0
    more: dict[str, Any] = {}
    if "copies" in storage:
        more["model_copies"] = [master.to(BF16 if "bf16" in storage else FP16) for master in masters]
    if "remainders" in storage:
        masters, more["remainders"] = (list(parts) for parts in zip(*map(split_master, masters), strict=True))
    if "int8" in storage:
        more["blocks"] = [BlockLayout(7, 50)] * len(sizes)
        stored = [quantize(*piece) for piece in zip(exp_avgs, more["blocks"], strict=True)]
        exp_avgs, more["scales"] = (list(parts) for parts in zip(*stored, strict=True))
    if "gradients" in storage:
        grads = [grad.to(BF16) for grad in grads]
    digits = list(torch.zeros(sum(sizes), dtype=torch.uint8).split(sizes))
    return StepTensors(masters, grads, exp_avgs, digits=digits, **more)


@pytest.mark.parametrize("pieces", [1 << 24, 600], ids=["at once", "in pieces"])
@pytest.mark.parametrize("kernel", ["reference", "foreach", *ONE_PASS, "auto"])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_digits_of_a_step_replay_it(
    storage: str, kernel: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel in ONE_PASS and storage == "fp16 copies":
        pytest.skip("the fused kernels write copies in bf16")
    if kernel in ONE_PASS and pieces == 600:
        pytest.skip("has no pieces")
    monkeypatch.setattr(passes, "MAX_NUMEL", pieces)
    monkeypatch.setattr(foreach, "MAX_NUMEL_CPU", pieces)
    scalars = StepScalars(LR, 0.9, 0.95, WEIGHT_DECAY, grad_scale=0.37)
    expected, actual = step(storage), on(device_of(kernel), step(storage))
    old = torch.cat(expected.model_params).clone()
    telemetry, sums = Telemetry(), Telemetry()
    is_counted = kernel != "triton"  # its interpreter takes seconds for sums
    lion_update_(expected, scalars, telemetry if is_counted else None)
    chosen(kernel, actual.kind)(actual, scalars, sums if is_counted else None)
    for name, tensors in expected.roles().items():
        assert all(torch.equal(one.cpu(), two) for one, two in zip(getattr(actual, name), tensors, strict=True)), name
    assert (sums.elements, sums.zeros) == (telemetry.elements, telemetry.zeros)

    digits, new = torch.cat(actual.digits).cpu(), torch.cat(actual.model_params).cpu()
    assert (digits & 3 == 0).sum() >= 90
    if new.dtype != FP32:
        assert (digits >= EXCEPTION).any(), "the case shows no exception"
    capacity = 0 if new.dtype == FP32 else int((digits >= EXCEPTION).sum())
    form = WireFormat(new.dtype, new.numel(), capacity, "remainders" in storage)
    messages = messages_of(CPU, new, digits, form, 1)
    mismatches = CPU.replay_(old, messages, [Run(0, len(old), LR, WEIGHT_DECAY)], form)
    assert same_bits(old, new) and mismatches.tolist() == [0]


def test_a_step_that_the_device_may_skip_has_no_digits() -> None:
    for kernel in ("reference", "foreach", *ONE_PASS):
        tensors = on(device_of(kernel), step("fp32"))
        update = chosen(kernel, tensors.kind)
        with pytest.raises(ValueError, match="cannot be skipped on the device: use skip=None"):
            update(tensors, StepScalars(LR, 0.9, 0.95, 0.0, skip=torch.zeros(1, dtype=torch.int32)))


def special_step(kernel: str, storage: str) -> StepTensors:
    """One step from masters at ties, around powers of two and denormal, by ``kernel``. NaNs have more than one code."""
    masters = special_values()
    masters = masters[masters.isfinite()].repeat(3)
    signs = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(len(masters) // 3)
    more: dict[str, Any] = {}
    if storage == "bf16 copies":
        more["model_copies"] = [masters.to(BF16)]
    parts = [masters.clone()]
    if storage == "remainders":
        high, low = split_master(masters)
        parts, more["remainders"] = [high], [low]
    digits = [torch.zeros(len(masters), dtype=torch.uint8)]
    tensors = on(device_of(kernel), StepTensors(parts, [signs], [torch.zeros(len(masters))], digits=digits, **more))
    chosen(kernel, tensors.kind)(tensors, StepScalars(0.3, 0.9, 0.95, WEIGHT_DECAY))
    return tensors


@pytest.mark.parametrize("storage", ["fp32", "bf16 copies", "remainders"])
def test_every_kernel_writes_the_digits_of_the_reference(storage: str) -> None:
    expected = special_step("reference", storage)
    for kernel in ("foreach", *ONE_PASS):
        assert torch.equal(special_step(kernel, storage).digits[0].cpu(), expected.digits[0]), kernel


def test_tensors_that_are_not_contiguous_have_digits_too() -> None:
    def steps(kernel: str) -> torch.Tensor:
        masters = [torch.linspace(-1, 1, 12).view(3, 4).t(), torch.ones(5)]
        digits = list(torch.zeros(17, dtype=torch.uint8).split((12, 5)))
        tensors = StepTensors(masters, [torch.ones(4, 3), -torch.ones(5)], [torch.zeros(4, 3), torch.zeros(5)])
        tensors = on(device_of(kernel), dataclasses.replace(tensors, digits=digits))
        chosen(kernel, tensors.kind)(tensors, StepScalars(LR, 0.9, 0.95, WEIGHT_DECAY))
        return torch.cat(tensors.digits).cpu()

    for kernel in ONE_PASS:
        assert torch.equal(steps(kernel), steps("reference")), kernel
        assert set(steps(kernel).tolist()) == {1, 3}


def test_digits_have_the_sizes_of_the_parameters() -> None:
    tensors = step("fp32")
    with pytest.raises(ValueError, match=r"digits\[3\] has 7 elements, but masters\[3\] has 1299"):
        dataclasses.replace(tensors, digits=[*tensors.digits[:3], torch.zeros(7, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"digits\[0\] must be contiguous uint8 on cpu, got torch.int8"):
        dataclasses.replace(tensors, digits=[digits.to(torch.int8) for digits in tensors.digits])
    assert [len(one) for one in tensors.select([True, False, False, True]).digits] == [700, 1299]


@pytest.mark.skipif(TRITON is None, reason="needs Triton")
@pytest.mark.parametrize("storage", ["fp32", "bf16 copies", "remainders", "remainders, int8 momentum"])
def test_triton_writes_digits_wherever_they_are(storage: str) -> None:
    """In whole blocks, tails and digits that are not aligned. They may move from one step to the next."""

    def steps(kernel: str) -> list[torch.Tensor]:
        tensors = on(device_of(kernel), step(storage, sizes=(2112, 1088)))
        found = []
        for start in (0, 0, 16, 3):
            buffer = torch.full((3220,), 77, dtype=torch.uint8, device=device_of(kernel))
            tensors.digits = list(buffer[start : start + 3200].split((2112, 1088)))
            chosen(kernel, tensors.kind)(tensors, StepScalars(LR, 0.9, 0.95, WEIGHT_DECAY))
            assert (buffer[:start] == 77).all() and (buffer[start + 3200 :] == 77).all()
            found.append(buffer.cpu())
        return found

    assert all(map(torch.equal, steps("triton"), steps("reference")))


@pytest.mark.skipif(TRITON is None, reason="needs Triton")
@pytest.mark.parametrize(("start", "whole_blocks"), [(0, 3), (16, 3), (3, 0)])
def test_wide_accesses_are_only_for_digits_that_are_aligned(start: int, whole_blocks: int) -> None:
    tensors = on(DEVICE, step("bf16 copies", sizes=(2112, 1088)))
    buffer = torch.zeros(3220, dtype=torch.uint8, device=DEVICE)
    tensors.digits = list(buffer[start : start + 3200].split((2112, 1088)))
    assert len(launch_table(tensors).whole) == whole_blocks


@pytest.mark.skipif(TRITON is None, reason="needs Triton")
def test_one_pass_kernels_write_digits_without_a_further_pass() -> None:
    kind = step("bf16 copies").kind
    assert choose("fused", kind, digits=True) is lion_update_fused_
    assert choose("fused", kind._replace(device=torch.device("cuda", 0)), digits=True) is lion_update_triton_
