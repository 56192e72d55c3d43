"""How Lion's state is stored in fewer bits than fp32, and exactly what that does to its values.

**Master weights, 16 bits beside a bf16 parameter**: :func:`split_master` and :func:`join_master` are exact inverses for
every fp32 number, ties, infinities and denormals included. Rounding to nearest even does not allow that: there two
masters, on either side of a tie, share a bf16 and a low half. So the bf16 rounds half away from zero, which differs
from torch's and Megatron's cast at ties alone: where the low half of an fp32 is 0x8000 and the bit above it 0.

**Momentum, 8 bits and one bf16 scale for 32 elements**: :func:`quantise` and :func:`dequantise`. The 8 bits hold the
square root of the magnitude, so that small elements of a block keep their sign and some of their size: Lion needs the
sign of a sum in which the momentum takes part. For an element m of a block whose largest magnitude is s, and its code
q, the error is at most (|q| + 1/4) s / 16129, up to the rounding of s to bf16: 0.8 % of s for the largest elements,
1/64516 of s for those that become zero. A block whose s lies below 2^-100 is stored as zeros.

Blocks lie along a parameter's last dimension, in the parameter's own coordinates, so that a shard that cuts no block
has the same codes and scales as the whole parameter. They are 32 long because Megatron's shards begin at multiples of
32 elements with up to 4 data-parallel ranks, where buckets are not padded further; 64 would save 1/32 byte an element.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

QUIET_NAN = 0x7FC00000
BLOCK = 32
LEVELS = 127**2
# Below it the smallest code's value would be denormal, and no longer give the code again.
SMALLEST_SCALE = 2.0**-100


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Cut fp32 ``master`` into its bf16, rounded half away from zero, and an int16 remainder, both of its shape.

    The fp32 is read as the integer n of its bits, whose magnitude grows with the number's: the bf16 is
    h = floor((n + 2^15) / 2^16), the remainder n - 2^16 h, in [-2^15, 2^15). A number that rounds beyond the largest
    bf16 gives infinity there and is still rebuilt. Every NaN becomes the same one, in whose place rounding could give a
    number. Nothing is modified. Raises ValueError for another dtype than fp32.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"a master to split is fp32, not {master.dtype}")
    bits = master.detach().contiguous().view(torch.int32)
    bits = torch.where(master.isnan(), QUIET_NAN, bits)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master that :func:`split_master` cut into ``param`` (bf16) and ``remainder`` (int16)."""
    high = param.detach().contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder.to(torch.int32)).view(torch.float32)


class Place(NamedTuple):
    """Where a flat piece of a parameter begins, and how long the parameter's rows are, in elements."""

    start: int
    row: int

    @classmethod
    def of_whole(cls, tensor: Tensor) -> "Place":
        """The place of a tensor that is a whole parameter; its rows lie along its last dimension."""
        return cls(0, max(tensor.shape[-1], 1) if tensor.dim() else 1)

    def cuts_a_block(self, numel: int) -> bool:
        """Whether a piece of ``numel`` elements here begins or ends inside a block."""
        inside = (self.start % self.row % BLOCK, (self.start + numel) % self.row % BLOCK)
        return numel > 0 and any(inside)

    def blocks(self, numel: int) -> int:
        """How many blocks a piece of ``numel`` elements that begins here touches."""
        if numel == 0:
            return 0
        return self._block(self.start + numel - 1) - self._block(self.start) + 1

    def _block(self, element: int) -> int:
        return element // self.row * math.ceil(self.row / BLOCK) + element % self.row // BLOCK


def quantise(values: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Codes (int8, the shape of ``values``) and scales (bf16, one a block) of fp32 ``values``, which are not modified.

    With every operation rounded on its own, and each rounding to nearest even::

        s = bf16(max |m| over the block), 0 where that is below 2^-100
        q = sign(m) * min(127, round(sqrt(|m| * (127^2 / s))))

    A block with a NaN or an infinity becomes NaN as a whole.
    """
    blocks = _in_blocks(values.detach().float(), place)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest < SMALLEST_SCALE, 0.0, largest).to(torch.bfloat16)
    scale = scales.float()
    # torch divides a number by a tensor as a product with the reciprocal, which rounds twice.
    inverse = torch.where(scale == 0.0, 0.0, torch.full_like(scale, LEVELS) / scale)
    # In fp32 torch's square root, which is MKL's, is not rounded to nearest; that of fp64 is close enough to become so.
    roots = (blocks.abs() * inverse).double().sqrt().float().clamp(max=127.0).round()
    codes = torch.copysign(torch.where(roots.isnan(), 0.0, roots), blocks).to(torch.int8)
    return _from_blocks(codes, place, values.numel()).view(values.shape), scales.flatten()


def dequantise(codes: Tensor, scales: Tensor, place: Place) -> Tensor:
    """The fp32 values of :func:`quantise`'s codes: m = (q |q|) * (s * (1 / 127^2)), each product rounded on its own.

    Quantising them again gives the same codes and scales.
    """
    blocks = _in_blocks(codes.to(torch.int32), place)
    values = (blocks * blocks.abs()).float() * (scales.float() * (1.0 / LEVELS)).unsqueeze(1)
    return _from_blocks(values, place, codes.numel()).view(codes.shape)


def _in_blocks(values: Tensor, place: Place) -> Tensor:
    """``values`` as [blocks, 32], with zeros where rows end and before the piece begins or after it ends."""
    row = min(place.row, BLOCK) if place.row % BLOCK == 0 else place.row
    before = place.start % row
    after = -(before + values.numel()) % row
    rows = functional.pad(values.flatten(), (before, after)).view(-1, row)
    blocks = functional.pad(rows, (0, -row % BLOCK)).view(-1, BLOCK)
    first = before // BLOCK
    return blocks[first : first + place.blocks(values.numel())]


def _from_blocks(blocks: Tensor, place: Place, numel: int) -> Tensor:
    """The inverse of :func:`_in_blocks`: the piece's own ``numel`` elements, flat."""
    row = min(place.row, BLOCK) if place.row % BLOCK == 0 else place.row
    width = math.ceil(row / BLOCK)
    before = place.start % row
    missing_before = before // BLOCK
    missing_after = -(missing_before + blocks.shape[0]) % width
    whole = functional.pad(blocks, (0, 0, missing_before, missing_after))
    piece = whole.reshape(-1, width * BLOCK)[:, :row].reshape(-1)[before : before + numel]
    return piece.contiguous()  # of rows of one element a reshape is a view, of 32 times the memory
