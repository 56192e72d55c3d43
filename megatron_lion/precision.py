"""Storage formats for Lion's state that use fewer bits than fp32, with their exact rounding.

**Master weights: 16 bits in addition to a bf16 parameter.** :func:`split_master` and :func:`join_master` are exact
inverses for every fp32 number, including ties, infinities and denormals. Rounding to nearest even does not allow that:
two masters on either side of a tie would share both the bf16 and the low half. So the bf16 rounds half away from zero.
It differs from torch's and Megatron's cast only at ties, where the low half of the fp32 is 0x8000 and the bit above it
is 0.

**Momentum: 8 bits per element and one bf16 scale per 32 elements.** :func:`quantize` and :func:`dequantize`. The 8 bits
hold the square root of the magnitude, so that small elements of a block keep their sign and some of their size: Lion
needs the sign of a sum that includes the momentum. For an element m of a block with largest magnitude s, stored as code
q, the error is at most (|q| + 1/4) s / 16129, up to the rounding of s to bf16: 0.8 % of s for the largest elements,
1/64516 of s for those that become zero. A block with s below 2^-100 is stored as zeros.

Blocks run along a parameter's last dimension and start at the beginning of each row of the parameter. A shard that
splits no block therefore has the same codes and scales as the whole parameter. Blocks have 32 elements because
Megatron's shards begin at multiples of 32 elements with up to 4 data-parallel ranks, where buckets get no further
padding; 64 would save 1/32 byte per element.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

QUIET_NAN = 0x7FC00000
BLOCK = 32
LEVELS = 127**2
# For smaller scales the value of code 1 would be denormal and would not quantize to the same code again.
SMALLEST_SCALE = 2.0**-100


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 ``master`` into its bf16, rounded half away from zero, and an int16 remainder of the same shape.

    With n the bits of the fp32 read as an integer: the bf16 is h = floor((n + 2^15) / 2^16) and the remainder is
    n - 2^16 h, in [-2^15, 2^15). A number that rounds beyond the largest bf16 becomes infinity in bf16 and is still
    rebuilt exactly. Every NaN becomes the same quiet NaN, because rounding could turn a NaN into a number. Returns new
    tensors. Raises ValueError for any dtype other than fp32.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"split_master needs an fp32 tensor, got {master.dtype}")
    bits = master.detach().contiguous().view(torch.int32)
    bits = torch.where(master.isnan(), QUIET_NAN, bits)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 master of ``param`` (bf16) and ``remainder`` (int16), as :func:`split_master` made them."""
    high = param.detach().contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder.to(torch.int32)).view(torch.float32)


class BlockLayout(NamedTuple):
    """Position of a flat piece of a parameter: its first element, and the length of the parameter's rows."""

    start: int
    row_length: int

    @classmethod
    def of_whole(cls, tensor: Tensor) -> "BlockLayout":
        """The layout of a whole parameter. Its rows run along the last dimension."""
        return cls(0, max(tensor.shape[-1], 1) if tensor.dim() else 1)

    def splits_a_block(self, numel: int) -> bool:
        """Whether a piece of ``numel`` elements begins or ends inside a block."""
        offsets = (self.start % self.row_length % BLOCK, (self.start + numel) % self.row_length % BLOCK)
        return numel > 0 and any(offsets)

    def count(self, numel: int) -> int:
        """Number of blocks that a piece of ``numel`` elements touches, and so its number of scales."""
        return block_counts(self.start, self.row_length, numel)


def block_counts[T: (int, Tensor)](start: T, row_length: T, numel: T) -> T:
    """:meth:`BlockLayout.count` for one piece, or element-wise for many in int64 tensors."""
    first, last = (
        element // row_length * -(-row_length // BLOCK) + element % row_length // BLOCK
        for element in (start, start + numel - 1)
    )
    return (last - first + 1) * (numel > 0)


def quantize(values: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the shape of ``values`` and bf16 scales, one per block. ``values`` are fp32, not modified.

    Every operation is rounded separately, to nearest even::

        s = bf16(max |m| over the block), 0 where that is below 2^-100
        q = sign(m) * min(127, round(sqrt(|m| * (127^2 / s))))

    All elements of a block that has a NaN or an infinity become NaN.
    """
    blocks = _in_blocks(values.detach().float(), layout)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest < SMALLEST_SCALE, 0.0, largest).to(torch.bfloat16)
    scale = scales.float()
    # Not LEVELS / scale: torch divides a Python number by a tensor as a product with the reciprocal, rounding twice.
    inverse = torch.where(scale == 0.0, 0.0, torch.full_like(scale, LEVELS) / scale)
    # torch's fp32 square root (MKL) is not rounded to nearest. The fp64 root, rounded to fp32, is.
    roots = (blocks.abs() * inverse).double().sqrt().float().clamp(max=127.0).round()
    codes = torch.copysign(torch.where(roots.isnan(), 0.0, roots), blocks).to(torch.int8)
    return _from_blocks(codes, layout, values.numel()).view(values.shape), scales.flatten()


def dequantize(codes: Tensor, scales: Tensor, layout: BlockLayout) -> Tensor:
    """Return the fp32 values of codes and scales: m = (q |q|) * (s * (1 / 127^2)), each product rounded separately.

    Quantizing them again gives the same codes and scales.
    """
    blocks = _in_blocks(codes.to(torch.int32), layout)
    values = (blocks * blocks.abs()).float() * (scales.float() * (1.0 / LEVELS)).unsqueeze(1)
    return _from_blocks(values, layout, codes.numel()).view(codes.shape)


def _in_blocks(values: Tensor, layout: BlockLayout) -> Tensor:
    """``values`` as [blocks, 32], padded with zeros at the end of rows and around the piece."""
    row = min(layout.row_length, BLOCK) if layout.row_length % BLOCK == 0 else layout.row_length
    before = layout.start % row
    after = -(before + values.numel()) % row
    rows = _padded(values.flatten(), before, after).view(-1, row)
    blocks = _padded(rows, 0, -row % BLOCK).reshape(-1, BLOCK)
    first = before // BLOCK
    return blocks[first : first + layout.count(values.numel())]


def _from_blocks(blocks: Tensor, layout: BlockLayout, numel: int) -> Tensor:
    """The inverse of :func:`_in_blocks`: the piece's ``numel`` elements, flat."""
    row = min(layout.row_length, BLOCK) if layout.row_length % BLOCK == 0 else layout.row_length
    width = math.ceil(row / BLOCK)
    before = layout.start % row
    missing_before = before // BLOCK
    missing_after = -(missing_before + blocks.shape[0]) % width
    whole = _padded(blocks.flatten(), missing_before * BLOCK, missing_after * BLOCK)
    piece = whole.reshape(-1, width * BLOCK)[:, :row].reshape(-1)[before : before + numel]
    return piece.contiguous()  # for rows of one element it is a view of 32 times the memory


def _padded(values: Tensor, before: int, after: int) -> Tensor:
    """``values`` with zeros around the last dimension, or ``values`` themselves if there is nothing to add."""
    return functional.pad(values, (before, after)) if before or after else values
