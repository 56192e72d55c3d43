"""Lion in one pass over a GPU's memory with Triton: one launch for all tensors of an update.

Written for CUDA but tested only in Triton's interpreter (``TRITON_INTERPRET=1``). It has not run on a GPU, so
``"auto"`` does not select it.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lion import precision
from megatron_lion.kernels.fused import supports_dtypes
from megatron_lion.precision import BlockLayout
from megatron_lion.step import ROLES, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry

SIZE = 1024  # elements of a program
BLOCK = tl.constexpr(precision.BLOCK)
LEVELS = tl.constexpr(precision.LEVELS)
UNIT = tl.constexpr(1.0 / precision.LEVELS)
SMALLEST_SCALE = tl.constexpr(precision.SMALLEST_SCALE)


@triton.jit
def _widen(bits):
    """Convert bf16, as a 16-bit integer, to fp32."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(value):
    """Round fp32 to the nearest bf16, ties to even, as a 16-bit integer."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, nearest_even, 0x7FC0).to(tl.uint16)


@triton.jit
def _load(pointers, inside):
    """Load fp32 from fp32 or, as 16-bit integers, bf16."""
    if pointers.dtype.element_ty == tl.uint16:
        value = _widen(tl.load(pointers, mask=inside, other=0))
    else:
        value = tl.load(pointers, mask=inside, other=0.0)
    return value


@triton.jit
def _store(pointers, value, inside):
    """Store fp32 as fp32 or, rounded to nearest even, bf16."""
    if pointers.dtype.element_ty == tl.uint16:
        tl.store(pointers, _narrow(value), mask=inside)
    else:
        tl.store(pointers, value, mask=inside)


@triton.jit
def _join(highs, lows, inside):
    """Load fp32 masters from bf16 parameters, as 16-bit integers, and their int16 remainders."""
    low = tl.load(lows, mask=inside, other=0).to(tl.int32)
    high = tl.load(highs, mask=inside, other=0).to(tl.int32)
    return ((high << 16) + low).to(tl.float32, bitcast=True)


@triton.jit
def _split(highs, lows, value, inside):
    """Store fp32 masters as bf16 rounded half away from zero, and the int16 remainders."""
    bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
    tl.store(highs, ((bits + 0x8000) >> 16).to(tl.uint16), mask=inside)
    tl.store(lows, bits.to(tl.int16), mask=inside)


@triton.jit
def _dequantize(codes, scales, inside):
    """Load fp32 momentum from int8 codes, one row per scale."""
    code = tl.load(codes, mask=inside, other=0).to(tl.int32)
    return (code * tl.abs(code)).to(tl.float32) * (scales * UNIT)[:, None]


@triton.jit
def _quantize(codes, scale_pointers, value, inside, known):
    """Store fp32 momentum as int8 codes and one scale per row; elements outside are zero."""
    magnitudes = (tl.where(inside, value, 0.0)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # Compared as integers, where a NaN is the largest. tl.max is not interpreted if Triton was imported before.
    largest = tl.reduce(magnitudes, 1, tl.standard._elementwise_max).to(tl.float32, bitcast=True)
    bits = _narrow(tl.where(largest < SMALLEST_SCALE, 0.0, largest))
    tl.store(scale_pointers, bits, mask=known)
    scale = _widen(bits)  # not read back: another thread of the program may not see the store yet
    finite = (scale > 0.0) & (scale < float("inf"))
    inverse = tl.where(finite, tl.div_rn(tl.full(scale.shape, LEVELS, tl.float32), tl.where(finite, scale, 1.0)), 0.0)
    root = tl.sqrt_rn(tl.abs(value) * inverse[:, None])
    root = tl.where(root < 127.0, root, 127.0)
    # Near 2^23 the last place has value 1: adding rounds to nearest even, and the low bits of the sum are the code.
    code = (tl.where(value < 0.0, -root, root) + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(codes, tl.where(finite[:, None], code, 0).to(tl.int8), mask=inside)


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _store_sums(sums, sign, g, m, theta, inside):
    """Store the six sums of :class:`Telemetry` over the elements inside, the last as the bits of an fp32."""
    gradient = tl.where(inside, g, 0.0).to(tl.float64)
    signs = tl.where(inside, sign, 0.0)
    zeros = tl.where(inside & (sign == 0.0), 1, 0)
    flipped = tl.where(signs * tl.where(m > 0.0, 1.0, tl.where(m < 0.0, -1.0, 0.0)) < 0.0, 1, 0)
    magnitudes = tl.where(inside, theta, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN is the largest
    tl.store(sums, tl.reduce(tl.abs(gradient), None, _add))
    tl.store(sums + 1, tl.reduce(gradient * gradient, None, _add))
    tl.store(sums + 2, tl.reduce(signs.to(tl.float64) * gradient, None, _add))
    tl.store(sums + 3, tl.reduce(zeros, None, _add).to(tl.float64))
    tl.store(sums + 4, tl.reduce(flipped, None, _add).to(tl.float64))
    largest = tl.reduce(magnitudes, None, tl.standard._elementwise_max)
    tl.store(sums + 5, largest.to(tl.float32, bitcast=True).to(tl.float64))


@triton.jit
def _lion_kernel(
    table,  # int64 [tensors, 9]: addresses of master, gradient, momentum, model copy, remainder, scales (0 if absent),
    # then the number of elements, and the block layout (start, row length)
    block_tensor,  # int32 [programs]: the tensor of each program
    block_number,  # int64 [programs]: its block of SIZE elements in that tensor
    hyper,  # fp32 [7]: lr, beta1, 1 - beta1, beta2, 1 - beta2, weight decay, gradient scale
    skip,  # int32 [1]: if it is not 0, nothing changes
    sums,  # fp64 [programs, 6] with TELEMETRY
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    REMAINDER: tl.constexpr,
    PACKED: tl.constexpr,  # momentum in int8
    TELEMETRY: tl.constexpr,
    SIZE: tl.constexpr,
):
    if tl.load(skip) == 0:
        program = tl.program_id(0)
        tensor = table + 9 * tl.load(block_tensor + program).to(tl.int64)
        number = tl.load(block_number + program)
        count = tl.load(tensor + 6)
        if PACKED:  # one row per block of momentum, which may be shorter than the row
            start = tl.load(tensor + 7)
            row = tl.load(tensor + 8)
            blocks_a_row = (row + BLOCK - 1) // BLOCK
            first = start // row * blocks_a_row + start % row // BLOCK
            block = number * (SIZE // BLOCK) + tl.arange(0, SIZE // BLOCK).to(tl.int64)
            column = (first + block) % blocks_a_row * BLOCK
            in_row = column[:, None] + tl.arange(0, BLOCK).to(tl.int64)[None, :]
            index = ((first + block) // blocks_a_row * row - start)[:, None] + in_row
            inside = (in_row < row) & (index >= 0) & (index < count)
            scale_pointers = tl.load(tensor + 5).to(tl.pointer_type(tl.uint16)) + block
            known = (first + block) // blocks_a_row * row + column < start + count
        else:
            index = number * SIZE + tl.arange(0, SIZE).to(tl.int64)
            inside = index < count
        params = tl.load(tensor).to(tl.pointer_type(PARAM)) + index
        grads = tl.load(tensor + 1).to(tl.pointer_type(GRAD)) + index
        momenta = tl.load(tensor + 2).to(tl.pointer_type(MOMENTUM)) + index
        remainders = tl.load(tensor + 4).to(tl.pointer_type(tl.int16)) + index
        theta = _join(params, remainders, inside) if REMAINDER else _load(params, inside)
        m = _dequantize(momenta, _load(scale_pointers, known), inside) if PACKED else _load(momenta, inside)
        g = _load(grads, inside) * tl.load(hyper + 6)
        c = m * tl.load(hyper + 1) + g * tl.load(hyper + 2)
        sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, 0.0))
        theta = theta - (sign + theta * tl.load(hyper + 5)) * tl.load(hyper)
        if TELEMETRY:
            _store_sums(sums + 6 * program, sign, g, m, theta, inside)
        m = m * tl.load(hyper + 3) + g * tl.load(hyper + 4)
        if REMAINDER:
            _split(params, remainders, theta, inside)
        else:
            _store(params, theta, inside)
        if PACKED:
            _quantize(momenta, scale_pointers, m, inside, known)
        else:
            _store(momenta, m, inside)
        if COPY:
            _store(tl.load(tensor + 3).to(tl.pointer_type(tl.uint16)) + index, theta, inside)


# bf16 is read and written as integers: Triton's interpreter flushes bf16 denormals and rounds its casts differently.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.uint16, torch.int8: tl.int8}


@torch.no_grad()
def lion_update_triton_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
    """:func:`megatron_lion.update.lion_update_` in one launch for any number of tensors; the same bits, in place.

    Tensors must be contiguous and of dtypes that :func:`~megatron_lion.kernels.fused.supports_dtypes`. Scalars in
    tensors, and ``skip``, must be on the tensors' device. The kernel reads them there, so that a captured graph follows
    what is written to them later. The first call on a set of tensors copies their addresses to the device. Later calls
    copy nothing from the host, so make one call before a capture. ``telemetry`` is summed in the same launch and read
    back on the host, so it cannot be captured. Issues no collective.

    Raises:
        ValueError: unsupported tensors; nothing was written.
    """
    kind = tensors.kind
    if kind is None or not any(tensors.numels):
        return
    if not supports_dtypes(kind):
        raise ValueError(f"the Triton kernel does not support {kind}; use kernels.choose")
    if not all(tensors.are_contiguous()):
        raise ValueError("the Triton kernel supports only contiguous tensors; use the reference")
    table, block_tensor, block_number = _tables(kind.device, _entries(tensors), kind.scales is not None)
    programs = len(block_number)
    sums = torch.zeros(0 if telemetry is None else programs, 6, dtype=torch.float64, device=kind.device)
    skip = scalars.skip
    _lion_kernel[(programs,)](
        table,
        block_tensor,
        block_number,
        _scalars_on(kind.device, scalars),
        torch.zeros(1, dtype=torch.int32, device=kind.device) if skip is None else skip,
        sums,
        PARAM=TYPES[kind.masters],
        GRAD=TYPES[kind.grads],
        MOMENTUM=TYPES[kind.exp_avgs],
        COPY=kind.model_copies is not None,
        REMAINDER=kind.remainders is not None,
        PACKED=kind.scales is not None,
        TELEMETRY=telemetry is not None,
        SIZE=SIZE,
        enable_fp_fusion=False,
    )
    if telemetry is not None and not scalars.skips():
        l1, l2_squared, inner, zeros, flipped, linf_param = [*sums[:, :5].sum(0).tolist(), float(sums[:, 5].max())]
        elements = sum(tensors.numels)
        telemetry.merge(Telemetry(elements, l1, l2_squared, inner, int(zeros), int(flipped), linf_param))


def _entries(tensors: StepTensors) -> tuple[tuple[int, ...], ...]:
    """Rows of the kernel's table."""
    roles, count = tensors.roles(), len(tensors.masters)
    addresses = (map(Tensor.data_ptr, roles[name]) if name in roles else itertools.repeat(0, count) for name in ROLES)
    blocks = tensors.blocks if "scales" in roles and tensors.blocks else itertools.repeat((0, SIZE), count)
    return tuple(zip(*addresses, tensors.numels, *zip(*blocks, strict=True), strict=True))


@functools.lru_cache(maxsize=64)
def _tables(device: torch.device, entries: tuple[tuple[int, ...], ...], packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel's table and, for each program, its tensor and block.

    Cached, because a graph cannot capture copies from the host, and because they take longer than a step.
    """
    table = torch.tensor(entries, dtype=torch.int64)
    sizes = [BlockLayout(*entry[7:]).count(entry[6]) * precision.BLOCK if packed else entry[6] for entry in entries]
    blocks = (torch.tensor(sizes, dtype=torch.int64) + SIZE - 1) // SIZE
    block_tensor = torch.repeat_interleave(torch.arange(len(entries), dtype=torch.int32), blocks)
    first = torch.repeat_interleave(torch.cumsum(blocks, 0) - blocks, blocks)
    block_number = torch.arange(len(first), dtype=torch.int64) - first
    return table.to(device), block_tensor.to(device), block_number.to(device)


def _scalars_on(device: torch.device, scalars: StepScalars) -> Tensor:
    """The kernel's numbers as one fp32 tensor, without reading a tensor on the host or copying a number from it."""
    beta1, beta2 = scalars.beta1, scalars.beta2
    values = (scalars.lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, scalars.weight_decay, scalars.grad_scale)
    parts = [
        value.reshape(1).to(device, torch.float32)
        if isinstance(value, Tensor)
        else torch.full((1,), value, dtype=torch.float32, device=device)
        for value in values
    ]
    return torch.cat(parts)
