"""Digits, messages and their replay by the compiled CPU kernel, with the bits of :mod:`megatron_lion.exchange`."""

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from megatron_lion.exchange.digits import FORMATS
from megatron_lion.exchange.message import Run, WireFormat, check_runs
from megatron_lion.kernels import compiler

SOURCE = compiler.SOURCE.with_name("exchange_cpu.cpp")


def exchange_cpu_problem() -> str | None:
    """Why the CPU kernel cannot be used on this machine, or None. Compiles it if needed."""
    try:
        compiler.load(SOURCE)
    except compiler.CompilerUnavailable as error:
        return str(error)
    return None


@torch.no_grad()
def sign_digits_cpu(
    old: Tensor, new: Tensor, sign: Tensor, *, lr: float, weight_decay: float, half_away: bool = False
) -> Tensor:
    """:func:`megatron_lion.exchange.digits.sign_digits` for CPU tensors."""
    old, new, sign = old.contiguous(), new.contiguous(), sign.to(torch.int8).contiguous()
    if not old.dtype == new.dtype or not old.shape == new.shape == sign.shape:
        raise ValueError(f"old and new are {old.dtype} {list(old.shape)} and {new.dtype} {list(new.shape)}")
    digits = torch.empty(old.shape, dtype=torch.uint8)
    compiler.load(SOURCE).exchange_digits(
        ctypes.c_int(FORMATS.index((old.dtype, half_away))),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (old, new, sign, digits)),
        ctypes.c_int64(old.numel()),
        ctypes.c_double(lr),
        ctypes.c_double(weight_decay),
    )
    return digits


@torch.no_grad()
def write_message_cpu_(message: Tensor, digits: Tensor, params: Tensor, form: WireFormat) -> None:
    """:func:`megatron_lion.exchange.message.write_message_` with ``torch.get_num_threads()`` threads, on the CPU."""
    form.check(params, message[None], digits)
    message[sum(form.section_bytes()[:3]) :].zero_()  # the table
    sections = _sections(message[None], form)
    compiler.load(SOURCE).exchange_write(
        ctypes.c_int(form.kind),
        _address(sections),
        ctypes.c_void_p(digits.data_ptr()),
        ctypes.c_void_p(params.data_ptr()),
        ctypes.c_int64(form.numel),
        ctypes.c_int64(form.capacity),
        ctypes.c_int(torch.get_num_threads()),
    )


@torch.no_grad()
def replay_cpu_(
    params: Tensor, messages: Tensor, runs: Sequence[Run], form: WireFormat, *, own: int | None = None
) -> Tensor:
    """:func:`megatron_lion.exchange.message.replay_` with ``torch.get_num_threads()`` threads, on the CPU."""
    form.check(params, messages)
    check_runs(runs, params.numel())
    sections = _sections(messages, form)
    mismatches = torch.zeros(len(messages), dtype=torch.int64)
    bounds = array("q", chain.from_iterable(run[:2] for run in runs))
    rates = array("d", chain.from_iterable(run[2:] for run in runs))
    compiler.load(SOURCE).exchange_replay(
        ctypes.c_int(form.kind),
        ctypes.c_void_p(params.data_ptr()),
        _address(sections),
        ctypes.c_int64(len(messages)),
        ctypes.c_int64(-1 if own is None else own),
        ctypes.c_int64(form.numel),
        ctypes.c_int64(form.capacity),
        _address(bounds),
        _address(rates),
        ctypes.c_int64(len(runs)),
        ctypes.c_void_p(mismatches.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    torch.autograd.graph.increment_version([params])  # the kernel wrote without autograd's knowledge
    return mismatches


def _sections(messages: Tensor, form: WireFormat) -> array:
    """The addresses of the sections of each message in turn."""
    starts = range(messages.data_ptr(), messages.data_ptr() + messages.nbytes, form.nbytes)
    offsets = list(accumulate(form.section_bytes()[:-1], initial=0))
    return array("Q", [start + offset for start in starts for offset in offsets])


def _address(values: array) -> ctypes.c_void_p:
    """Where ``values`` are in memory, as long as the caller keeps them."""
    return ctypes.c_void_p(values.buffer_info()[0])
