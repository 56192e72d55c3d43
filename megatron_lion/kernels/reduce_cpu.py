"""Packed gradients and their sum by the compiled CPU kernel, with the bits of :mod:`megatron_lion.exchange.pieces`."""

import ctypes

import torch
from torch import Tensor

from megatron_lion.exchange.blocks import CODES, Residual
from megatron_lion.exchange.pieces import PieceFormat
from megatron_lion.kernels import compiler
from megatron_lion.kernels.cpu_library import call, check_on_cpu

SOURCE = compiler.SOURCE.with_name("reduce_cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
ARGUMENTS = {
    "reduce_write": (_INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _ADDRESS, _ADDRESS, _SIZE, _INT),
    "reduce_sum": (_INT, _INT, _ADDRESS, _ADDRESS, *[_SIZE] * 5, _ADDRESS, _SIZE, _INT),
}


def reduce_cpu_problem() -> str | None:
    """Why the CPU kernel cannot be used on this machine, or None. Compiles it if needed."""
    return compiler.problem(SOURCE)


@torch.no_grad()
def write_blocks_cpu_(message: Tensor, gradient: Tensor, residual: Residual | None, form: PieceFormat) -> None:
    """:func:`megatron_lion.exchange.pieces.write_blocks_` with ``torch.get_num_threads()`` threads, on the CPU."""
    form.check(gradient, message[None])
    check_on_cpu(message, gradient)
    parts = form.sections(message)
    # 0 for no residual, 1 for int8 and 2 for bf16.
    feedback, codes, scales = 0, None, None
    if residual is not None:
        codes = residual.codes.data_ptr()
        feedback, scales = (2, None) if residual.scales is None else (1, residual.scales.data_ptr())
    call(
        SOURCE,
        ARGUMENTS,
        "reduce_write",
        *_kind(form),
        *(gradient.data_ptr(), parts.scales.data_ptr(), parts.codes.data_ptr()),
        *(feedback, codes, scales, form.numel, torch.get_num_threads()),
    )


@torch.no_grad()
def sum_blocks_cpu(own: Tensor, messages: Tensor, rank: int, form: PieceFormat) -> Tensor:
    """:func:`megatron_lion.exchange.pieces.sum_blocks` with ``torch.get_num_threads()`` threads, on the CPU."""
    form.check(own, messages)
    check_on_cpu(own, messages)
    total = torch.empty(form.numel, dtype=torch.float32)
    exact, scales, _ = form.section_bytes()
    call(
        SOURCE,
        ARGUMENTS,
        "reduce_sum",
        *_kind(form),
        *(own.data_ptr(), messages.data_ptr(), len(messages), form.nbytes, exact, exact + scales, rank),
        *(total.data_ptr(), form.numel, torch.get_num_threads()),
    )
    return total


def _kind(form: PieceFormat) -> tuple[int, int]:
    return DTYPES.index(form.dtype), CODES.index(form.code)
