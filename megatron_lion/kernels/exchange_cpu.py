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
from megatron_lion.kernels.cpu_library import call, check_on_cpu

SOURCE = compiler.SOURCE.with_name("exchange_cpu.cpp")
_ADDRESS, _SIZE, _INT, _RATE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
ARGUMENTS = {
    "exchange_digits": (_INT, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _RATE, _RATE),
    "exchange_count": (_ADDRESS, _SIZE, _ADDRESS),
    "exchange_write": (_INT, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _SIZE, _INT),
    "exchange_replay": (
        *(_INT, _ADDRESS, _ADDRESS, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE),
        *(_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _INT),
    ),
}


def exchange_cpu_problem() -> str | None:
    """Why the CPU kernel cannot be used on this machine, or None. Compiles it if needed."""
    return compiler.problem(SOURCE)


@torch.no_grad()
def sign_digits_cpu(
    old: Tensor, new: Tensor, sign: Tensor, *, lr: float, weight_decay: float, half_away: bool = False
) -> Tensor:
    """:func:`megatron_lion.exchange.digits.sign_digits` for CPU tensors."""
    old, new, sign = old.contiguous(), new.contiguous(), sign.to(torch.int8).contiguous()
    check_on_cpu(old, new, sign)
    if not old.dtype == new.dtype or not old.shape == new.shape == sign.shape:
        raise ValueError(f"old and new are {old.dtype} {list(old.shape)} and {new.dtype} {list(new.shape)}")
    digits = torch.empty(old.shape, dtype=torch.uint8)
    addresses = [tensor.data_ptr() for tensor in (old, new, sign, digits)]
    number = FORMATS.index((old.dtype, half_away))
    call(SOURCE, ARGUMENTS, "exchange_digits", number, *addresses, old.numel(), lr, weight_decay)
    return digits


def count_exceptions_cpu(digits: Tensor) -> Tensor:
    """:func:`megatron_lion.exchange.digits.count_exceptions` for CPU tensors, in one pass."""
    digits = digits.contiguous()
    check_on_cpu(digits)
    count = torch.empty((), dtype=torch.int64)
    call(SOURCE, ARGUMENTS, "exchange_count", digits.data_ptr(), digits.numel(), count.data_ptr())
    return count


@torch.no_grad()
def write_message_cpu_(message: Tensor, digits: Tensor, params: Tensor, form: WireFormat) -> None:
    """:func:`megatron_lion.exchange.message.write_message_` with ``torch.get_num_threads()`` threads, on the CPU."""
    form.check(message, digits, params)
    check_on_cpu(message, digits, params)
    message[sum(form.section_bytes()[:3]) :].zero_()  # the table
    sections = _sections(message[None], form)
    addresses = (_address(sections), digits.data_ptr(), params.data_ptr())
    call(SOURCE, ARGUMENTS, "exchange_write", form.kind, *addresses, form.numel, form.capacity, torch.get_num_threads())


@torch.no_grad()
def replay_cpu_(
    params: Tensor, messages: Tensor, runs: Sequence[Run], form: WireFormat, *, own: int | None = None, start: int = 0
) -> Tensor:
    """:func:`megatron_lion.exchange.message.replay_` with ``torch.get_num_threads()`` threads, on the CPU."""
    shard_numel = form.check_shards(params, messages, start)
    check_runs(runs, params.numel())
    check_on_cpu(params, messages)
    sections = _sections(messages, form)
    mismatches = torch.zeros(len(messages), dtype=torch.int64)
    bounds = array("q", chain.from_iterable(run[:2] for run in runs))
    rates = array("d", chain.from_iterable(run[2:] for run in runs))
    call(
        SOURCE,
        ARGUMENTS,
        "exchange_replay",
        *(form.kind, params.data_ptr(), _address(sections), len(messages), -1 if own is None else own),
        *(shard_numel, start, form.numel, form.capacity, _address(bounds), _address(rates), len(runs)),
        *(mismatches.data_ptr(), torch.get_num_threads()),
    )
    torch.autograd.graph.increment_version([params])  # the kernel wrote without autograd's knowledge
    return mismatches


def _sections(messages: Tensor, form: WireFormat) -> array:
    """The addresses of the sections of each message in turn."""
    starts = range(messages.data_ptr(), messages.data_ptr() + messages.nbytes, form.nbytes)
    offsets = list(accumulate(form.section_bytes()[:-1], initial=0))
    return array("Q", [start + offset for start in starts for offset in offsets])


def _address(values: array) -> int:
    """Where ``values`` are in memory, as long as the caller keeps them."""
    return values.buffer_info()[0]
