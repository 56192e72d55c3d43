"""How master weights are stored in fewer bits: a bf16 parameter and the 16 bits that it lacks.

``split_master`` and ``join_master`` are exact inverses for every fp32 number, ties, infinities and denormals included.
Rounding to nearest even does not allow that: there two masters, on either side of a tie, share a bf16 and a low half.
So the bf16 rounds half away from zero, which differs from torch's and Megatron's cast at ties alone: where the low half
of an fp32 is 0x8000 and the bit above it 0.
"""

import torch
from torch import Tensor

QUIET_NAN = 0x7FC00000


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
