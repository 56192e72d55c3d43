"""The message in which one rank sends its gradient of another rank's shard, and the sum of such messages.

A message is one uint8 tensor. Its size depends only on the :class:`PieceFormat`, which all ranks know::

    exact   the gradient's dtype    elements that are sent as they are
    scales  bf16 [blocks]           of all elements, with zeros in the place of the exact ones
    codes   uint8                   packed integers (:mod:`megatron_lion.exchange.blocks`)

filled with zeros to a multiple of 16 bytes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange import blocks
from megatron_lion.exchange.blocks import CODES, Residual

ALIGNMENT = 16


class Sections(NamedTuple):
    """Views of the parts of a message."""

    exact: Tensor
    scales: Tensor
    codes: Tensor


@dataclass(frozen=True)
class PieceFormat:
    """How gradients of a shard of ``numel`` elements are sent.

    Args:
        code: one of :data:`megatron_lion.exchange.blocks.CODES`.
        numel: the size of the shard.
        dtype: of the gradient: fp32, bf16 or fp16.
        exact: where the shard has elements that are sent as they are, as (start, stop) in ascending order.
    """

    code: str
    numel: int
    dtype: torch.dtype = torch.float32
    exact: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"code {self.code!r} is unknown: use one of {', '.join(CODES)}")

    @property
    def exact_numel(self) -> int:
        """Elements that are sent as they are."""
        return sum(stop - start for start, stop in self.exact)

    def section_bytes(self) -> tuple[int, int, int]:
        """Bytes of each section of a message, in the order of :class:`Sections`."""
        exact = -(-self.exact_numel * self.dtype.itemsize // 4) * 4
        return exact, 2 * blocks.count_blocks(self.numel), blocks.packed_bytes(self.code, self.numel)

    @property
    def nbytes(self) -> int:
        """Bytes of a message."""
        return -(-sum(self.section_bytes()) // ALIGNMENT) * ALIGNMENT

    def sections(self, message: Tensor) -> Sections:
        """The parts of ``message``, uint8 [nbytes], contiguous and aligned to 4 bytes."""
        exact, scales, codes = torch.split(message[: sum(self.section_bytes())], list(self.section_bytes()))
        values = exact.view(self.dtype)[: self.exact_numel]
        return Sections(values, scales.view(torch.bfloat16), codes)

    def check(self, shard: Tensor, messages: Tensor) -> None:
        """Raise ValueError unless ``shard`` is a gradient of this format and ``messages`` are rows of its messages."""
        for name, tensor, dtype, shape in (
            ("the gradient", shard, self.dtype, (self.numel,)),
            ("messages", messages, torch.uint8, (len(messages), self.nbytes)),
        ):
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous, {dtype} {list(shape)}, "
                    f"not {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
                )


@torch.no_grad()
def write_blocks_(message: Tensor, gradient: Tensor, residual: Residual | None, form: PieceFormat) -> None:
    """Write the scales and the codes of ``gradient`` plus ``residual`` into ``message``, and the new residual.

    With v = gradient + residual in fp32, v is sent as q s, and ``residual`` becomes v - q s.

    Args:
        message: uint8 [form.nbytes]; its exact section is not modified.
        gradient: [form.numel] of form.dtype, not modified.
        residual: of as many elements, modified in place; None for no error feedback.
        form: the format of the message.
    """
    parts = form.sections(message)
    values = gradient.float()
    if residual is not None:
        values = values + residual.values(form.numel)
    codes, scales = blocks.quantize(values, form.code)
    parts.scales.copy_(scales)
    parts.codes.copy_(blocks.pack(codes, form.code, form.numel))
    if residual is not None:
        residual.store_(values - blocks.dequantize(codes, scales, form.numel))


@torch.no_grad()
def sum_blocks(own: Tensor, messages: Tensor, rank: int, form: PieceFormat) -> Tensor:
    """The sum of ``own`` and of the values in ``messages``, fp32 [form.numel], added in the order of the ranks.

    Args:
        own: this rank's gradient of its shard, [form.numel] of form.dtype.
        messages: uint8 [ranks - 1, form.nbytes], of the other ranks in ascending order.
        rank: this rank, which is where ``own`` is added.
        form: the format of the messages.
    """
    total = torch.zeros(form.numel, dtype=torch.float32, device=own.device)
    for index, message in enumerate(messages):
        if index == rank:
            total += own
        parts = form.sections(message)
        total += blocks.dequantize(blocks.unpack(parts.codes, form.code, form.numel), parts.scales, form.numel)
    return total + own if rank == len(messages) else total


@torch.no_grad()
def write_exact_(message: Tensor, gradient: Tensor, form: PieceFormat) -> None:
    """Move the exact elements of ``gradient`` into ``message``. They become zero in ``gradient``."""
    if form.exact:
        spans = _exact_spans(gradient, form)
        torch.cat(spans, out=form.sections(message).exact)
        torch._foreach_zero_(spans)


@torch.no_grad()
def sum_exact_(total: Tensor, own: Tensor, messages: Tensor, rank: int, form: PieceFormat) -> None:
    """Set the exact elements of ``total`` to their sum, added in fp32 in the order of the ranks.

    The arguments are those of :func:`sum_blocks`; ``total`` is what it returned, fp32 [form.numel].
    """
    if form.exact:
        pieces = [form.sections(message).exact for message in messages]
        pieces.insert(rank, torch.cat(_exact_spans(own, form)))
        summed = torch.zeros(form.exact_numel, dtype=torch.float32, device=own.device)
        for piece in pieces:
            summed += piece
        sizes = [stop - start for start, stop in form.exact]
        torch._foreach_copy_(_exact_spans(total, form), torch.split(summed, sizes))


def _exact_spans(shard: Tensor, form: PieceFormat) -> list[Tensor]:
    return [shard[start:stop] for start, stop in form.exact]
