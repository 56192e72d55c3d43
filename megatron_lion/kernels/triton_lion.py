"""Lion in one pass over a GPU's memory with Triton: one launch for all tensors, a program for each block of them.

Written for CUDA and tested in Triton's interpreter alone (``TRITON_INTERPRET=1``); it has not been run on a GPU, so
``"auto"`` does not choose it.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lion import precision
from megatron_lion.precision import Place
from megatron_lion.telemetry import Telemetry

SIZE = 1024  # elements of a program
BLOCK = tl.constexpr(precision.BLOCK)
LEVELS = tl.constexpr(precision.LEVELS)
UNIT = tl.constexpr(1.0 / precision.LEVELS)
SMALLEST_SCALE = tl.constexpr(precision.SMALLEST_SCALE)


@triton.jit
def _widen(bits):
    """The fp32 of a bf16 given as a 16-bit integer."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(value):
    """The bf16 of an fp32, rounded to nearest even, as a 16-bit integer."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, nearest_even, 0x7FC0).to(tl.uint16)


@triton.jit
def _load(pointers, inside):
    """fp32 from memory that holds fp32 or, as 16-bit integers, bf16."""
    if pointers.dtype.element_ty == tl.uint16:
        value = _widen(tl.load(pointers, mask=inside, other=0))
    else:
        value = tl.load(pointers, mask=inside, other=0.0)
    return value


@triton.jit
def _store(pointers, value, inside):
    """fp32 to memory that holds fp32 or, rounded to nearest even, bf16."""
    if pointers.dtype.element_ty == tl.uint16:
        tl.store(pointers, _narrow(value), mask=inside)
    else:
        tl.store(pointers, value, mask=inside)


@triton.jit
def _join(highs, lows, inside):
    """The fp32 masters of bf16 parameters, as 16-bit integers, and their int16 remainders."""
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
def _dequantise(codes, scales, inside):
    """The fp32 momentum of int8 codes, a row for each scale."""
    code = tl.load(codes, mask=inside, other=0).to(tl.int32)
    return (code * tl.abs(code)).to(tl.float32) * (scales * UNIT)[:, None]


@triton.jit
def _quantise(codes, scale_pointers, value, inside, known):
    """Store fp32 momentum as int8 codes and a scale for each row; elements outside are zero."""
    magnitudes = (tl.where(inside, value, 0.0)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # As integers, among which a NaN is the largest. tl.max itself is not interpreted where Triton was imported before.
    largest = tl.reduce(magnitudes, 1, tl.standard._elementwise_max).to(tl.float32, bitcast=True)
    bits = _narrow(tl.where(largest < SMALLEST_SCALE, 0.0, largest))
    tl.store(scale_pointers, bits, mask=known)
    scale = _widen(bits)  # not read back: another thread of the program may not see yet what was stored
    finite = (scale > 0.0) & (scale < float("inf"))
    inverse = tl.where(finite, tl.div_rn(tl.full(scale.shape, LEVELS, tl.float32), tl.where(finite, scale, 1.0)), 0.0)
    root = tl.sqrt_rn(tl.abs(value) * inverse[:, None])
    root = tl.where(root < 127.0, root, 127.0)
    # A number near 2^23 has its units in the last place: the sum rounds to nearest even, and ends in the code.
    code = (tl.where(value < 0.0, -root, root) + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(codes, tl.where(finite[:, None], code, 0).to(tl.int8), mask=inside)


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _store_sums(sums, sign, g, m, theta, inside):
    """Store what :class:`Telemetry` sums, over the elements inside, as six numbers; the last as the bits of an fp32."""
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
    table,  # int64 [tensors, 9]: addresses of parameter, gradient, momentum, copy, remainder, scales (0 where there is
    # none), then the number of elements, and where in its parameter the tensor begins and how long the rows there are
    block_tensor,  # int32 [programs]: the tensor that a program works on
    block_number,  # int64 [programs]: which of that tensor's blocks
    hyper,  # fp32 [7]: lr, beta1, 1 - beta1, beta2, 1 - beta2, weight decay, gradient scale
    skip,  # int32 [1]: not 0 where nothing must change
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
        if PACKED:  # a row of the program for each block of momentum, which may be shorter than the row
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
        m = _dequantise(momenta, _load(scale_pointers, known), inside) if PACKED else _load(momenta, inside)
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
            _quantise(momenta, scale_pointers, m, inside, known)
        else:
            _store(momenta, m, inside)
        if COPY:
            _store(tl.load(tensor + 3).to(tl.pointer_type(tl.uint16)) + index, theta, inside)


# bf16 is read and written as integers: Triton's interpreter flushes its denormals and rounds its casts otherwise.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.uint16, torch.int8: tl.int8}


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

    Tensors are contiguous, on one device, and each role is fp32 or bf16, momentum also int8 with ``scales``; ``copies``
    are bf16. ``lr``, ``weight_decay`` and ``grad_scale`` may be one-element tensors on that device, which the kernel
    reads there, so that a captured graph follows what is later written to them. ``skip``, an int32 tensor of one
    element, leaves everything as it was where it is not 0. The first call on a set of tensors copies their addresses to
    the device, later calls copy nothing from the host: make one before a capture. ``telemetry`` is summed in the same
    launch, and read back at its end: it cannot be captured. Raises ValueError, and writes nothing, where sizes or
    dtypes do not fit.
    """
    given = [role for role in (copies, remainders, scales) if role is not None]
    if scales is not None and places is None:
        places = [Place.of_whole(param) for param in params]
    rows = list(zip(params, grads, exp_avgs, *given, strict=True))
    if not any(row[0].numel() for row in rows):
        return
    _check(params, grads, exp_avgs, copies, remainders, scales, places)
    absent = [0] * len(rows)
    addresses = (
        absent if role is None else [tensor.data_ptr() for tensor in role]
        for role in (params, grads, exp_avgs, copies, remainders, scales)
    )
    where = [(0, SIZE)] * len(rows) if scales is None or places is None else places
    entries = zip(*addresses, [param.numel() for param in params], *zip(*where, strict=True), strict=True)
    device = params[0].device
    table, block_tensor, block_number = _tables(device, tuple(entries), scales is not None)
    programs = len(block_number)
    sums = torch.zeros(0 if telemetry is None else programs, 6, dtype=torch.float64, device=device)
    _lion_kernel[(programs,)](
        table,
        block_tensor,
        block_number,
        _hyper(device, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, weight_decay, grad_scale),
        torch.zeros(1, dtype=torch.int32, device=device) if skip is None else skip,
        sums,
        PARAM=TYPES[params[0].dtype],
        GRAD=TYPES[grads[0].dtype],
        MOMENTUM=TYPES[exp_avgs[0].dtype],
        COPY=copies is not None,
        REMAINDER=remainders is not None,
        PACKED=scales is not None,
        TELEMETRY=telemetry is not None,
        SIZE=SIZE,
        enable_fp_fusion=False,
    )
    if telemetry is not None and not (skip is not None and bool(skip)):
        l1, l2_squared, inner, zeros, flipped, linf_param = [*sums[:, :5].sum(0).tolist(), float(sums[:, 5].max())]
        elements = sum(param.numel() for param in params)
        telemetry.merge(Telemetry(elements, l1, l2_squared, inner, int(zeros), int(flipped), linf_param))


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    remainders: Sequence[Tensor] | None,
    scales: Sequence[Tensor] | None,
    places: Sequence[Place] | None,
) -> None:
    plain = {torch.float32, torch.bfloat16}
    for name, role, dtypes in (
        ("params", params, plain if remainders is None else {torch.bfloat16}),
        ("grads", grads, plain),
        ("exp_avgs", exp_avgs, plain if scales is None else {torch.int8}),
        ("copies", copies, {torch.bfloat16}),
        ("remainders", remainders, {torch.int16}),
        ("scales", scales, {torch.bfloat16}),
    ):
        for tensor, param in zip(role or (), params, strict=False):
            if tensor.dtype not in dtypes or tensor.dtype != role[0].dtype:  # type: ignore[index]
                raise ValueError(f"{name} must be of one dtype, one of {dtypes}, not {tensor.dtype}")
            if not tensor.is_contiguous() or (name != "scales" and tensor.numel() != param.numel()):
                raise ValueError(f"{name} must be contiguous and of one size with the parameters")
    for param, scale, place in zip(params, scales or (), places or (), strict=False):
        if place.blocks(param.numel()) != scale.numel():
            wanted = place.blocks(param.numel())
            raise ValueError(f"{param.numel()} elements at {place} have {wanted} scales, not {scale.numel()}")


@functools.lru_cache(maxsize=64)
def _tables(device: torch.device, entries: tuple[tuple[int, ...], ...], packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's table, and for each program its tensor and block; kept, as a graph cannot capture copies from the
    host, and they take longer than a step."""
    table = torch.tensor(entries, dtype=torch.int64)
    sizes = [Place(*entry[7:]).blocks(entry[6]) * precision.BLOCK if packed else entry[6] for entry in entries]
    blocks = (torch.tensor(sizes, dtype=torch.int64) + SIZE - 1) // SIZE
    block_tensor = torch.repeat_interleave(torch.arange(len(entries), dtype=torch.int32), blocks)
    first = torch.repeat_interleave(torch.cumsum(blocks, 0) - blocks, blocks)
    block_number = torch.arange(len(first), dtype=torch.int64) - first
    return table.to(device), block_tensor.to(device), block_number.to(device)


def _hyper(device: torch.device, *values: float | Tensor) -> Tensor:
    """The values as one fp32 tensor on ``device``: the host does not read those that are tensors, nor copy numbers."""
    parts = [
        value.reshape(1).to(device, torch.float32)
        if isinstance(value, Tensor)
        else torch.full((1,), value, dtype=torch.float32, device=device)
        for value in values
    ]
    return torch.cat(parts)
