"""What the Triton kernel reads about its tensors on the device, made once for a set of tensors.

Two launches share one table. One updates the whole blocks of all tensors that are aligned: no masks, 128-bit accesses.
The other updates tails and unaligned tensors. Each program reads the number of its tensor, then that tensor's row::

    0-5   addresses of master, gradient, momentum, model copy, remainder, scales (0 if absent)
    6     number of elements
    7, 8  block layout: start, row length
    9     in the launch of whole blocks: add it to the program's number for the number of its block
    10    the same in the other launch
    11    address of the digits (0 if absent)
"""

import itertools
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.kernels.triton_lion_kernel import SIZE
from megatron_lion.precision import BLOCK, block_counts
from megatron_lion.step import ROLES, StepTensors

ALIGNMENT = 16  # bytes of the widest access


@dataclass(frozen=True)
class LaunchTable:
    """Tensors on the device that every launch on one set of tensors reads.

    A captured graph has their addresses, so they must live as long as it does.
    """

    rows: Tensor
    """int64 [tensors, 12]"""
    whole: Tensor
    """int32: the tensor of each program of the launch of whole blocks"""
    rest: Tensor
    """int32: the tensor of each program of the other launch"""
    never: Tensor
    """int32 [1]: 0, the flag of a step that is never skipped"""
    digits: list[int]
    """Addresses of the digits, which may be others in each step"""


def launch_table(tensors: StepTensors) -> LaunchTable:
    """Make the table of contiguous ``tensors`` with one copy to their device, which is not waited for.

    Raises:
        LionError: a CUDA graph is being captured, which must not include that copy.
    """
    assert tensors.kind is not None
    device = tensors.kind.device
    if tensors.are_captured():
        raise LionError(
            "the Triton kernel cannot copy the addresses of new tensors to the GPU while a CUDA graph is captured. "
            "Make one step with the same parameters, gradients and state before the capture"
        )
    whole, rest, columns = _columns(tensors)
    host = torch.cat([columns, torch.stack([whole, rest])]).t().contiguous()
    if device.type == "cuda":
        host = host.pin_memory()
    table = host.to(device, non_blocking=True)
    number = torch.arange(len(host), dtype=torch.int32, device=device)

    def tensor_of(column: int, programs: Tensor) -> Tensor:
        # output_size: else it would wait for the device
        return torch.repeat_interleave(number, table[:, column], output_size=int(programs.sum()))

    return LaunchTable(
        rows=table[:, :-2].contiguous(),
        whole=tensor_of(-2, whole),
        rest=tensor_of(-1, rest),
        never=torch.zeros(1, dtype=torch.int32, device=device),
        digits=digit_addresses(tensors),
    )


def digit_addresses(tensors: StepTensors) -> list[int]:
    """Where the step leaves its digits; empty without."""
    return list(map(Tensor.data_ptr, tensors.digits or ()))


def _columns(tensors: StepTensors) -> tuple[Tensor, Tensor, Tensor]:
    """For each tensor its whole blocks, its other blocks, and the columns of the table."""
    count, roles = len(tensors.masters), tensors.roles()
    given = iter(_int64(array("q", tensors.addresses)).view(-1, count))
    addresses = torch.stack([next(given) if name in roles else torch.zeros(count, dtype=torch.int64) for name in ROLES])
    digits = torch.tensor(digit_addresses(tensors) or [0] * count)
    numels = _int64(tensors.numels)
    aligned = ~(addresses % ALIGNMENT).any(0) & (digits % ALIGNMENT == 0)
    starts = row_lengths = torch.zeros(count, dtype=torch.int64)
    if tensors.scales is not None and tensors.blocks is not None:
        starts, row_lengths = _int64(array("q", itertools.chain.from_iterable(tensors.blocks))).view(-1, 2).unbind(1)
        aligned &= (starts % BLOCK == 0) & (row_lengths % BLOCK == 0)
        blocks = -(-block_counts(starts, row_lengths, numels) * BLOCK // SIZE)
    else:
        blocks = -(-numels // SIZE)
    whole = torch.where(aligned, numels // SIZE, 0)
    rest = blocks - whole
    first_of_whole, first_of_rest = (counts.cumsum(0) - counts for counts in (whole, rest))
    last = torch.stack([numels, starts, row_lengths, -first_of_whole, whole - first_of_rest, digits])
    return whole, rest, torch.cat([addresses, last])


def _int64(values: array[int]) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64)
