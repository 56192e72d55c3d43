"""Kernels, formats and parameters that the tests of the exchange share."""

import importlib.util

import pytest
import torch

from megatron_lion.exchange import digits
from megatron_lion.exchange.digits import CODES, FORMATS
from megatron_lion.kernels.exchange import CPU, REFERENCE, ExchangeKernels, choose_exchange
from megatron_lion.precision import split_master

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CUDA = torch.device("cuda", 0)
IDS = ["fp32", "bf16", "bf16_half_away", "fp16"]

EVERY_FORMAT = pytest.mark.parametrize(("dtype", "half_away"), FORMATS, ids=IDS)
SIXTEEN_BITS = pytest.mark.parametrize(("dtype", "half_away"), FORMATS[1:], ids=IDS[1:])


def triton_kernels():
    """The Triton kernels, in Triton's interpreter where there is no GPU; None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    importlib.import_module("triton")  # not under the variable: its own functions would be interpreted too
    with pytest.MonkeyPatch.context() as patch:  # Triton looks when a kernel is defined
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        return choose_exchange("fused", CUDA)


TRITON = triton_kernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [REFERENCE, CPU] + [TRITON] * (TRITON is not None)
EVERY_KERNEL = pytest.mark.parametrize("kernels", KERNELS, ids=["reference", "cpu", "triton"][: len(KERNELS)])
COMPILED = pytest.mark.parametrize("kernels", KERNELS[1:], ids=["cpu", "triton"][: len(KERNELS) - 1])


def exceptions_in(message: torch.Tensor) -> int:
    """The number of exceptions that ``message`` says it has: the first number of its header."""
    return int(message[:8].view(torch.int64))


def on_device(kernels: ExchangeKernels, *tensors):
    """The tensors where ``kernels`` can read them."""
    device = DEVICE if kernels is TRITON else "cpu"
    return [tensor.to(device) for tensor in tensors]


def cast(master, dtype, half_away):
    return split_master(master)[0] if half_away else master.to(dtype)


def codes(params):
    """The bits of parameters, in which -0.0 is not 0.0 and a NaN equals itself; of fp32, with one NaN only."""
    bits = params.view(CODES[params.dtype])
    return bits.masked_fill(params.isnan(), 0x7FC00000) if params.dtype == FP32 else bits


def same_bits(actual, expected):
    return actual.dtype == expected.dtype and torch.equal(codes(actual.cpu()), codes(expected.cpu()))


def special_values():
    """Zeros, denormals, infinities, NaN, the largest numbers of each format, ties, and numbers around powers of two."""
    ends = [0.0, 1e-45, 1e-40, 2.0**-126, 1.1754942e-38, 5.9e-8, 2.0**-25, 2.0**-24, 6.1e-5, 65504.0, 65519.9, 65520.0]
    ends += [3.3895314e38, 3.4e38, float("inf"), float("nan")]
    powers = [2.0**k * (1 + step * 2.0**-23) for k in (-14, -9, -1, 0, 1, 10) for step in range(-4, 5)]
    ties = [2.0**k * (1 + (n + 0.5) * 2.0**-bits) for k in (-8, 0) for n in range(4) for bits in (7, 10)]
    values = torch.tensor(ends + powers + ties)
    return torch.cat([values, -values])


def one_step(numel, runs, dtype, half_away, *, seed=0, special=True):
    """Parameters before and after a step on ``runs``, its signs and digits, by the reference."""
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(numel, generator=generator) * 10.0 ** torch.empty(numel).uniform_(-6, 1, generator=generator)
    if special:
        tail = special_values()[:numel]
        master[numel - len(tail) :] = tail
    old = cast(master, dtype, half_away)
    master = old.clone() if dtype == FP32 else master
    signs = torch.randint(-1, 2, (numel,), generator=generator, dtype=torch.int8)
    new, out = old.clone(), torch.zeros(numel, dtype=torch.uint8)
    for start, stop, lr, weight_decay in runs:
        piece = slice(start, stop)
        new[piece] = cast(digits.step(master[piece], signs[piece], lr, weight_decay), dtype, half_away)
        rates = {"lr": lr, "weight_decay": weight_decay, "half_away": half_away}
        out[piece] = digits.sign_digits(old[piece], new[piece], signs[piece], **rates)
    return old, new, signs, out


def messages_of(kernels, new, digits_of_all, form, ranks):
    """The messages of all shards, written by ``kernels``."""
    new, digits_of_all = on_device(kernels, new, digits_of_all)
    messages = form.new_messages(ranks, new.device)
    for rank in range(ranks):
        shard = slice(rank * form.numel, (rank + 1) * form.numel)
        kernels.write_message_(messages[rank], digits_of_all[shard], new[shard], form)
    return messages


def capacity_for(dtype, count):
    return 0 if dtype == FP32 else count
