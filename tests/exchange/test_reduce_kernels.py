"""Every kernel of packed gradients has the reference's bits, also for NaN, infinities, denormals and short blocks."""

import importlib.util

import pytest
import torch

from megatron_lion.exchange.blocks import BLOCK, CODES, Residual
from megatron_lion.exchange.pieces import PieceFormat
from megatron_lion.kernels.reduce import CPU, REFERENCE, choose_reduce
from tests.exchange.exchange_cases import CUDA, DEVICE


def triton_kernels():
    """The Triton kernels, in Triton's interpreter where there is no GPU; None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    with pytest.MonkeyPatch.context() as patch:  # Triton looks when a kernel is defined
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        return choose_reduce("fused", CUDA)


TRITON = triton_kernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 63, 64, 65, 319, 321, 1000, BLOCK * 400 + 5]
FEEDBACKS = ["int8", "bf16", None]
FEW = ("int4", torch.float32, "int8")  # in every run of Triton's interpreter, which takes seconds


def gradient(numel, *, seed, dtype, special=False):
    """Blocks of 50 orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.empty(-(-numel // BLOCK)).uniform_(-45, 4, generator=generator)
    values = torch.randn(numel, generator=generator) * scale.repeat_interleave(BLOCK)[:numel]
    values = torch.where(torch.rand(numel, generator=generator) < 0.1, 0.0, values)
    if special and numel > 400:
        values[3], values[100], values[200], values[330] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
    return values.to(dtype)


def same(one, other):
    """Equal bits, where every NaN is the same."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.float().nan_to_num(nan=7.0), other.float().nan_to_num(nan=7.0))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_the_cpu_kernel_has_the_references_bits(code, dtype, feedback):
    compare(CPU, code, dtype, feedback, SIZES)


@pytest.mark.skipif(TRITON is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("code", "dtype", "feedback"),
    [
        pytest.param(code, dtype, feedback, marks=[] if (code, dtype, feedback) == FEW else [pytest.mark.slow])
        for code in CODES
        for dtype in DTYPES
        for feedback in FEEDBACKS
    ],
    ids=str,
)
def test_the_triton_kernels_have_the_references_bits(code, dtype, feedback):
    compare(TRITON, code, dtype, feedback, [1, 500] if DEVICE == "cpu" else SIZES)


def compare(kernels, code, dtype, feedback, sizes):
    """Messages, residuals and sums of ``kernels`` and of the reference, over three steps of each of ``sizes``."""
    device = DEVICE if kernels is TRITON else "cpu"
    for numel in sizes:
        form = PieceFormat(code, numel, dtype, exact=((0, 1),))
        messages = torch.zeros(2, 3, form.nbytes, dtype=torch.uint8, device=device)
        residuals = [Residual.zeros(feedback, numel, device) if feedback else None for _ in range(2)]
        for step in range(3):
            values = gradient(numel, seed=step, dtype=dtype, special=step == 2).to(device)
            for which, residual, rows in zip((REFERENCE, kernels), residuals, messages, strict=True):
                which.write_blocks_(rows[step], values, residual, form)
            assert torch.equal(messages[0, step], messages[1, step]), (numel, step)
            assert residuals[0] is None or all(map(same, *residuals)), (numel, step)
        own = gradient(numel, seed=7, dtype=dtype).to(device)
        for rank in (0, 1, 3):
            sums = (which.sum_blocks(own, messages[0], rank, form) for which in (REFERENCE, kernels))
            assert same(*sums), (numel, rank)


def test_several_threads_have_the_same_bits():
    form = PieceFormat("ternary", BLOCK * 2000)
    values = gradient(form.numel, seed=1, dtype=torch.float32)
    threads, messages = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            messages.append(torch.zeros(form.nbytes, dtype=torch.uint8))
            CPU.write_blocks_(messages[-1], values, None, form)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*messages)


def test_the_choice():
    cpu = torch.device("cpu")
    assert choose_reduce("auto", cpu) is choose_reduce("fused", cpu) is CPU
    assert choose_reduce("reference", cpu) is choose_reduce("foreach", cpu) is REFERENCE
