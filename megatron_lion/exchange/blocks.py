"""Gradients in blocks of 64 with one scale, and what such a form leaves out.

A block v of 64 neighbors becomes integers q and one bf16 scale s. The values are q s, an exact product in fp32:

- ``int8`` and ``int4``, L = 127 and 7::

      s = bf16(max |v| / L),    q = round(v / s), at most L in magnitude

- ``ternary``::

      t = 0.7 mean |v|,    s = bf16(mean of the |v| above t),    q = sign(v) where |v| > t, else 0

Everything is fp32 with each operation rounded to nearest even. A block with s = 0 is zero. A block with a NaN or an
infinity becomes NaN. The last block is filled up with zeros.

The residual v - q s is exact in fp32 for ``int8`` and ``int4``. It is kept in bf16, or in the blocks of ``int8``.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_lion.exchange import trits

BLOCK = 64
CODES = ("int8", "int4", "ternary")
LEVELS = {"int8": 127.0, "int4": 7.0}
QUIET_NAN = 0x7FC0  # the bits of a bf16
THRESHOLD = 0.7  # of the mean magnitude: smaller elements become 0 in a ternary block


def count_blocks(numel: int) -> int:
    """Blocks of ``numel`` elements."""
    return -(-numel // BLOCK)


def packed_bytes(code: str, numel: int) -> int:
    """Bytes of ``numel`` packed integers of ``code``, one of ``CODES``, without scales."""
    if code == "ternary":
        return trits.packed_bytes(numel)
    return count_blocks(numel) * (BLOCK if code == "int8" else BLOCK // 2)


def quantize(values: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """The integers, int8 [blocks, 64], and the scales, bf16 [blocks], of ``values``, fp32 [n]."""
    blocks = functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    magnitudes = blocks.abs()
    if code == "ternary":
        kept = magnitudes > (_sum(magnitudes) * (1 / BLOCK) * THRESHOLD).unsqueeze(1)
        scales = _sum(torch.where(kept, magnitudes, 0.0)) / kept.sum(1).clamp(min=1)
        quotients = torch.sign(blocks) * kept
    else:
        levels = LEVELS[code]
        scales = magnitudes.amax(1) / torch.full_like(magnitudes[:, 0], levels)
        divisors = scales.to(torch.bfloat16).float().unsqueeze(1)
        quotients = torch.where(divisors > 0, blocks / divisors, 0.0).round().clamp(-levels, levels)
    # A ternary block with an infinity keeps it, or nothing where the threshold is infinite.
    finite = magnitudes.isfinite().all(1) & scales.isfinite()
    bits = scales.to(torch.bfloat16).view(torch.int16).masked_fill(~finite, QUIET_NAN)
    return torch.where(finite.unsqueeze(1), quotients, 0.0).to(torch.int8), bits.view(torch.bfloat16)


def dequantize(codes: Tensor, scales: Tensor, numel: int) -> Tensor:
    """The values q s, fp32 [numel], of what :func:`quantize` returned."""
    return (codes.view(-1, BLOCK).float() * scales.float().unsqueeze(1)).view(-1)[:numel]


def pack(codes: Tensor, code: str, numel: int) -> Tensor:
    """The integers of :func:`quantize` for ``numel`` values in uint8 [packed_bytes]. Byte j of an int4 block holds
    element j in its low half and j + 32 in its high half, in two's complement."""
    if code == "ternary":
        return trits.pack_trits(codes.view(-1)[:numel])
    if code == "int4":
        low, high = codes.chunk(2, dim=1)
        codes = low & 15 | high << 4
    return codes.reshape(-1).view(torch.uint8)


def unpack(packed: Tensor, code: str, numel: int) -> Tensor:
    """The inverse of :func:`pack`: int8 [blocks, 64]."""
    if code == "ternary":
        return functional.pad(trits.unpack_trits(packed, numel), (0, -numel % BLOCK)).view(-1, BLOCK)
    codes = packed.view(torch.int8)
    if code == "int4":
        halves = codes.view(-1, BLOCK // 2)
        codes = torch.cat([halves << 4 >> 4, halves >> 4], dim=1)
    return codes.view(-1, BLOCK)


class Residual(NamedTuple):
    """The rounding error of ``numel`` values: bf16 [numel], or int8 [blocks, 64] with bf16 scales [blocks]."""

    codes: Tensor
    scales: Tensor | None

    @classmethod
    def zeros(cls, feedback: str, numel: int, device: torch.device | str) -> "Residual":
        """A residual of zeros in the form ``feedback``: "int8" or "bf16"."""
        if feedback == "bf16":
            return cls(torch.zeros(numel, dtype=torch.bfloat16, device=device), None)
        blocks = count_blocks(numel)
        codes = torch.zeros(blocks, BLOCK, dtype=torch.int8, device=device)
        return cls(codes, torch.zeros(blocks, dtype=torch.bfloat16, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def values(self, numel: int) -> Tensor:
        """The values, fp32 [numel]."""
        return self.codes.float() if self.scales is None else dequantize(self.codes, self.scales, numel)

    def store_(self, values: Tensor) -> None:
        """Replace the values by ``values``, fp32 [numel], rounded to this form."""
        if self.scales is None:
            self.codes.copy_(values)
            return
        codes, scales = quantize(values, "int8")
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def zero_(self) -> None:
        """Set the values to zero."""
        for tensor in self:
            if tensor is not None:
                tensor.zero_()

    def scale_(self, factor: float) -> None:
        """Multiply the values by ``factor``, a power of two."""
        (self.codes if self.scales is None else self.scales).mul_(factor)


def _sum(blocks: Tensor) -> Tensor:
    """The sum of each block in a fixed order: halves are added until one element is left."""
    while blocks.shape[1] > 1:
        low, high = blocks.chunk(2, dim=1)
        blocks = low + high
    return blocks[:, 0]
