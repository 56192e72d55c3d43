"""Lion in one pass over a GPU's memory with Triton: one launch for all tensors, a program for each block of them.

Written for CUDA and tested in Triton's interpreter alone (``TRITON_INTERPRET=1``); it has not been run on a GPU, so
``"auto"`` does not choose it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lion.precision import Place
from megatron_lion.telemetry import Telemetry

BLOCK = 1024


@triton.jit
def _load(pointers, inside):
    """fp32 from memory that holds fp32 or, as 16-bit integers, bf16."""
    if pointers.dtype.element_ty == tl.uint16:
        value = (tl.load(pointers, mask=inside, other=0).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(pointers, mask=inside, other=0.0)
    return value


@triton.jit
def _store(pointers, value, inside):
    """fp32 to memory that holds fp32 or, rounded to nearest even, bf16."""
    if pointers.dtype.element_ty == tl.uint16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointers, tl.where(value == value, nearest_even, 0x7FC0).to(tl.uint16), mask=inside)
    else:
        tl.store(pointers, value, mask=inside)


@triton.jit
def _lion_kernel(
    addresses,  # int64 [tensors, 4]: parameter, gradient, momentum, copy (0 where there is none)
    counts,  # int64 [tensors]
    block_tensor,  # int32 [programs]: the tensor that a program works on
    block_number,  # int64 [programs]: which of that tensor's blocks
    hyper,  # fp32 [7]: lr, beta1, 1 - beta1, beta2, 1 - beta2, weight decay, gradient scale
    skip,  # int32 [1]: not 0 where nothing must change
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    SIZE: tl.constexpr,
):
    if tl.load(skip) == 0:
        program = tl.program_id(0)
        tensor = tl.load(block_tensor + program).to(tl.int64)
        index = tl.load(block_number + program) * SIZE + tl.arange(0, SIZE).to(tl.int64)
        inside = index < tl.load(counts + tensor)
        row = addresses + 4 * tensor
        params = tl.load(row).to(tl.pointer_type(PARAM)) + index
        grads = tl.load(row + 1).to(tl.pointer_type(GRAD)) + index
        momenta = tl.load(row + 2).to(tl.pointer_type(MOMENTUM)) + index
        theta = _load(params, inside)
        m = _load(momenta, inside)
        g = _load(grads, inside) * tl.load(hyper + 6)
        c = m * tl.load(hyper + 1) + g * tl.load(hyper + 2)
        sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, 0.0))
        theta = theta - (sign + theta * tl.load(hyper + 5)) * tl.load(hyper)
        m = m * tl.load(hyper + 3) + g * tl.load(hyper + 4)
        _store(params, theta, inside)
        _store(momenta, m, inside)
        if COPY:
            _store(tl.load(row + 3).to(tl.pointer_type(tl.uint16)) + index, theta, inside)


# bf16 is read and written as integers: Triton's interpreter flushes its denormals and rounds its casts otherwise.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.uint16}


@torch.no_grad()
def lion_update_triton_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    copies: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor] | None = None,
    scales: Sequence[Tensor] | None = None,
    places: Sequence[Place] | None = None,
    telemetry: Telemetry | None = None,
    skip: Tensor | None = None,
) -> None:
    """:func:`megatron_lion.update.lion_update_` in one launch, however many tensors there are; the same bits, in place.

    Tensors are contiguous, on one device, and each role is fp32 or bf16; ``copies`` are bf16. ``lr``, ``weight_decay``
    and ``grad_scale`` may be one-element tensors on that device, which the kernel reads there, so that a captured graph
    follows what is later written to them. ``skip``, an int32 tensor of one element, leaves everything as it was where
    it is not 0.
    """
    if remainders is not None or scales is not None:
        raise ValueError("this kernel takes no packed state: use the reference")
    roles = [params, grads, exp_avgs] + ([] if copies is None else [copies])
    rows = [row for row in zip(*roles, strict=True) if row[0].numel()]
    if not rows:
        return
    for row in rows:
        if not all(tensor.is_contiguous() and tensor.numel() == row[0].numel() for tensor in row):
            raise ValueError("parameter, gradient, momentum and copy must be contiguous and of one size")
        if any(tensor.dtype not in TYPES for tensor in row[:3]):
            raise ValueError(f"parameter, gradient and momentum must be fp32 or bf16, not {[t.dtype for t in row[:3]]}")
    device = rows[0][0].device
    addresses = [[*(tensor.data_ptr() for tensor in row), *([0] * (4 - len(row)))] for row in rows]
    counts = torch.tensor([row[0].numel() for row in rows], dtype=torch.int64)
    blocks = (counts + BLOCK - 1) // BLOCK
    block_tensor = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), blocks)
    first = torch.repeat_interleave(torch.cumsum(blocks, 0) - blocks, blocks)
    block_number = torch.arange(int(blocks.sum()), dtype=torch.int64) - first
    _lion_kernel[(len(block_number),)](
        torch.tensor(addresses, dtype=torch.int64).to(device),
        counts.to(device),
        block_tensor.to(device),
        block_number.to(device),
        _hyper(device, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, weight_decay, grad_scale),
        torch.zeros(1, dtype=torch.int32, device=device) if skip is None else skip,
        PARAM=TYPES[rows[0][0].dtype],
        GRAD=TYPES[rows[0][1].dtype],
        MOMENTUM=TYPES[rows[0][2].dtype],
        COPY=copies is not None,
        SIZE=BLOCK,
        enable_fp_fusion=False,
    )


def _hyper(device: torch.device, *values: float | Tensor) -> Tensor:
    """The values as one fp32 tensor on ``device``; those that are tensors are not read by the host."""
    parts = [
        value.reshape(1).to(device, torch.float32)
        if isinstance(value, Tensor)
        else torch.tensor([value], dtype=torch.float32, device=device)
        for value in values
    ]
    return torch.cat(parts)
