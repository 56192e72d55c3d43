"""Five trits (-1, 0 or 1) in a byte: 1.6 bits a trit, 0.95 % more than log2(3).

Trits are packed in groups of 320 in 64 bytes. Byte j of a group holds elements j, j + 64, ..., j + 256 of the group::

    byte_j = sum over k = 0..4 of 3^k (trit_{j + 64 k} + 1)

so that packing and unpacking work on whole rows of 64 neighbors. The last group is filled up with zeros. Bytes above
242 do not occur.
"""

import torch
from torch import Tensor

DIGITS = 5  # trits in a byte
GROUP_BYTES = 64
GROUP = DIGITS * GROUP_BYTES  # elements


def packed_bytes(numel: int) -> int:
    """Bytes of ``numel`` packed trits: 64 for each group of 320 that has begun."""
    return -(-numel // GROUP) * GROUP_BYTES


def pack_trits(trits: Tensor) -> Tensor:
    """Pack ``trits``, int8 [n] of -1, 0 and 1, into uint8 [packed_bytes(n)]."""
    filled = torch.zeros(packed_bytes(trits.numel()) * DIGITS, dtype=torch.int16, device=trits.device)
    filled[: trits.numel()] = trits
    rows = filled.view(-1, DIGITS, GROUP_BYTES) + 1
    packed = rows[:, DIGITS - 1]
    for k in reversed(range(DIGITS - 1)):
        packed = packed * 3 + rows[:, k]
    return packed.reshape(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, numel: int) -> Tensor:
    """The first ``numel`` trits in ``packed`` (uint8, as :func:`pack_trits` returns it), int8 [numel]."""
    rest = packed.view(-1, GROUP_BYTES).to(torch.int16)
    rows = []
    for _ in range(DIGITS):
        rows.append(rest % 3 - 1)
        rest = rest // 3
    return torch.stack(rows, dim=1).reshape(-1)[:numel].to(torch.int8)
