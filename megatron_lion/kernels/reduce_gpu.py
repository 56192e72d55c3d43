"""Packed gradients and their sum on a GPU with Triton, with the bits of :mod:`megatron_lion.exchange.pieces`.

Nothing here waits for the device. Tested in Triton's interpreter (``TRITON_INTERPRET=1``) and compiled for GPUs; it has
not been run on one.
"""

import torch
from torch import Tensor

from megatron_lion.exchange.blocks import CODES, Residual, count_blocks
from megatron_lion.exchange.digits import FORMATS
from megatron_lion.exchange.pieces import PieceFormat
from megatron_lion.exchange.trits import DIGITS
from megatron_lion.kernels import reduce_triton as kernels

TILE = 16  # blocks of 64 that a program takes at a time


@torch.no_grad()
def write_blocks_gpu_(message: Tensor, gradient: Tensor, residual: Residual | None, form: PieceFormat) -> None:
    """:func:`megatron_lion.exchange.pieces.write_blocks_` in one launch."""
    form.check(gradient, message[None])
    parts = form.sections(message)
    scales = parts.scales.view(torch.int16)
    feedback, kept, kept_scales = 0, scales, scales  # the last two are not read
    if residual is not None and residual.scales is not None:
        feedback, kept, kept_scales = 1, residual.codes, residual.scales.view(torch.int16)
    elif residual is not None:
        feedback, kept = 2, residual.codes.view(torch.int16)
    kernels.write_kernel[_grid(form)](
        _codes(gradient),
        scales,
        parts.codes.view(torch.int8),
        kept,
        kept_scales,
        form.numel,
        **_kind(form),
        FEEDBACK=feedback,
        enable_fp_fusion=False,
    )


@torch.no_grad()
def sum_blocks_gpu(own: Tensor, messages: Tensor, rank: int, form: PieceFormat) -> Tensor:
    """:func:`megatron_lion.exchange.pieces.sum_blocks` in one launch."""
    form.check(own, messages)
    total = torch.empty(form.numel, dtype=torch.float32, device=own.device)
    exact, scales, _ = form.section_bytes()
    kernels.sum_kernel[_grid(form)](
        _codes(own),
        messages.view(torch.int8),
        total,
        len(messages),
        form.nbytes,
        exact,
        exact + scales,
        rank,
        form.numel,
        **_kind(form),
        enable_fp_fusion=False,
    )
    return total


def _rows(form: PieceFormat) -> int:
    """Blocks that share bytes."""
    return DIGITS if form.code == "ternary" else 1


def _grid(form: PieceFormat) -> tuple[int]:
    return (-(-count_blocks(form.numel) // (TILE * _rows(form))),)


def _kind(form: PieceFormat) -> dict[str, int]:
    number = FORMATS.index((form.dtype, False))
    return {"FORMAT": number, "CODE": CODES.index(form.code), "TILE": TILE, "ROWS": _rows(form)}


def _codes(values: Tensor) -> Tensor:
    """fp32 as it is, 16-bit gradients as int16: Triton's interpreter has no bf16 of its own."""
    return values if values.dtype == torch.float32 else values.view(torch.int16)
