"""The device code of :mod:`megatron_lion.kernels.triton_lion`, in Triton's language.

All loads of a program are before all of its stores: nothing makes one thread wait for another thread's store to global
memory. Products and sums are not contracted, because the launch passes ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from megatron_lion import precision
from megatron_lion.kernels.exchange_triton import BF16, BF16_HALF_AWAY, _digit

SIZE = 1024  # elements of a program
COLUMNS = tl.constexpr(12)  # of the table, see triton_lion_table
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
def _load(pointers, inside, WHOLE: tl.constexpr):
    """Load as stored. A mask would keep the compiler from wide accesses, so whole blocks have none."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0)


@triton.jit
def _store(pointers, value, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=inside)


@triton.jit
def _as_fp32(value):
    """Convert loaded fp32 or, as 16-bit integers, bf16."""
    if value.dtype == tl.uint16:
        value = _widen(value)
    return value


@triton.jit
def _store_fp32(pointers, value, inside, WHOLE: tl.constexpr):
    """Store fp32 as fp32 or, rounded to nearest even, bf16."""
    if pointers.dtype.element_ty == tl.uint16:
        _store(pointers, _narrow(value), inside, WHOLE)
    else:
        _store(pointers, value, inside, WHOLE)


@triton.jit
def _join(high, low):
    """fp32 masters of bf16 parameters, as 16-bit integers, and their int16 remainders."""
    return ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _unless_nan(master):
    """The bits of fp32 masters, one and the same for every NaN."""
    return tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _upper(master):
    """The bf16 parameter of a master that has a remainder, as a 16-bit integer: rounded half away from zero."""
    return ((_unless_nan(master) + 0x8000) >> 16).to(tl.uint16)


@triton.jit
def _dequantize(codes, scales):
    """fp32 momentum of int8 codes, one row per scale."""
    code = codes.to(tl.int32)
    return (code * tl.abs(code)).to(tl.float32) * (scales * UNIT)[:, None]


@triton.jit
def _quantize(value, inside, WHOLE: tl.constexpr):
    """int8 codes of fp32 momentum and the bits of one bf16 scale per row. Elements outside count as zero."""
    magnitudes = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not WHOLE:
        magnitudes = tl.where(inside, magnitudes, 0)
    # Compared as integers, where a NaN is the largest. tl.max is not interpreted if Triton was imported before.
    largest = tl.reduce(magnitudes, 1, tl.standard._elementwise_max).to(tl.float32, bitcast=True)
    bits = _narrow(tl.where(largest < SMALLEST_SCALE, 0.0, largest))
    scale = _widen(bits)
    finite = (scale > 0.0) & (scale < float("inf"))
    inverse = tl.where(finite, tl.div_rn(tl.full(scale.shape, LEVELS, tl.float32), tl.where(finite, scale, 1.0)), 0.0)
    root = tl.sqrt_rn(tl.abs(value) * inverse[:, None])
    root = tl.where(root < 127.0, root, 127.0)
    # Near 2^23 the last place has value 1: adding rounds to nearest even, and the low bits of the sum are the code.
    code = (tl.where(value < 0.0, -root, root) + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(finite[:, None], code, 0).to(tl.int8), bits


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _store_sums(sums, sign, g, m, theta, inside, WHOLE: tl.constexpr):
    """Store the six sums of :class:`Telemetry` over the elements inside, the last as the bits of an fp32."""
    magnitudes = theta.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN is the largest
    zeros = sign == 0.0
    if not WHOLE:
        g, sign, zeros = tl.where(inside, g, 0.0), tl.where(inside, sign, 0.0), zeros & inside
        magnitudes = tl.where(inside, magnitudes, 0)
    gradient = g.to(tl.float64)
    flipped = sign * tl.where(m > 0.0, 1.0, tl.where(m < 0.0, -1.0, 0.0)) < 0.0
    tl.store(sums, tl.reduce(tl.abs(gradient), None, _add))
    tl.store(sums + 1, tl.reduce(gradient * gradient, None, _add))
    tl.store(sums + 2, tl.reduce(sign.to(tl.float64) * gradient, None, _add))
    tl.store(sums + 3, tl.reduce(tl.where(zeros, 1, 0), None, _add).to(tl.float64))
    tl.store(sums + 4, tl.reduce(tl.where(flipped, 1, 0), None, _add).to(tl.float64))
    largest = tl.reduce(magnitudes, None, tl.standard._elementwise_max)
    tl.store(sums + 5, largest.to(tl.float32, bitcast=True).to(tl.float64))


@triton.jit
def _digits(param, theta, stepped, sign, lr, weight_decay, COPY: tl.constexpr, REMAINDER: tl.constexpr):
    """What other ranks need to repeat the step of masters from ``theta`` to ``stepped`` (exchange/digits.py).

    They have the model's parameters: the copies, or ``param`` as it was loaded. Without remainders ``param`` is the
    whole master, so that the sign is enough.
    """
    if COPY:
        digit = _digit(_narrow(theta), _narrow(stepped), sign, lr, weight_decay, BF16)
    elif REMAINDER:
        digit = _digit(param, _upper(stepped), sign, lr, weight_decay, BF16_HALF_AWAY)
    else:
        digit = sign.to(tl.int32) & 3
    return digit.to(tl.uint8)


@triton.jit
def _address(entry, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Read an address from the table. The launch of whole blocks has only multiples of 16 bytes."""
    pointer = tl.load(entry).to(tl.pointer_type(TYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _number(value, ON_DEVICE: tl.constexpr):
    """A scalar argument: a number, or the address of one."""
    return tl.load(value).to(tl.float32) if ON_DEVICE else value


@triton.jit
def _whole_block(number, PACKED: tl.constexpr, SIZE: tl.constexpr):
    """Indices of the elements of a block, and of its scales."""
    scales = number * (SIZE // BLOCK) + tl.arange(0, SIZE // BLOCK)
    if PACKED:
        index = (tl.arange(0, SIZE // BLOCK) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    else:
        index = tl.arange(0, SIZE)
    return number * SIZE + index, scales


@triton.jit
def _any_block(number, tensor, PACKED: tl.constexpr, SIZE: tl.constexpr):
    """As :func:`_whole_block`, and which of the elements and of the scales exist."""
    count = tl.load(tensor + 6)
    scales = number * (SIZE // BLOCK) + tl.arange(0, SIZE // BLOCK)
    if PACKED:  # one row per block of momentum, which may be shorter than the row
        start = tl.load(tensor + 7)
        row = tl.load(tensor + 8)
        blocks_a_row = (row + BLOCK - 1) // BLOCK
        block = start // row * blocks_a_row + start % row // BLOCK + scales
        in_rows = block // blocks_a_row
        column = (block - in_rows * blocks_a_row) * BLOCK
        in_row = column[:, None] + tl.arange(0, BLOCK)[None, :]
        index = (in_rows * row - start)[:, None] + in_row
        inside = (in_row < row) & (index >= 0) & (index < count)
        known = in_rows * row + column < start + count
    else:
        index = number * SIZE + tl.arange(0, SIZE)
        inside = index < count
        known = scales < 0
    return index, scales, inside, known


@triton.jit
def _update(
    tensor,
    index,
    inside,
    scale_index,
    known,
    lr,
    beta1,
    rest1,
    beta2,
    rest2,
    weight_decay,
    grad_scale,
    sums,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    REMAINDER: tl.constexpr,
    PACKED: tl.constexpr,
    TELEMETRY: tl.constexpr,
    DIGITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update one block of elements."""
    params = _address(tensor, PARAM, WHOLE) + index
    momenta = _address(tensor + 2, MOMENTUM, WHOLE) + index
    remainders = _address(tensor + 4, tl.int16, WHOLE) + index
    scale_pointers = _address(tensor + 5, tl.uint16, WHOLE) + scale_index
    param = _load(params, inside, WHOLE)
    g = _as_fp32(_load(_address(tensor + 1, GRAD, WHOLE) + index, inside, WHOLE))
    momentum = _load(momenta, inside, WHOLE)
    theta = _join(param, _load(remainders, inside, WHOLE)) if REMAINDER else _as_fp32(param)
    m = _dequantize(momentum, _widen(_load(scale_pointers, known, WHOLE))) if PACKED else _as_fp32(momentum)
    g = g * grad_scale
    c = m * beta1 + g * rest1
    sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, 0.0))
    stepped = theta - (sign + theta * weight_decay) * lr
    if DIGITS:
        digits = _digits(param, theta, stepped, sign, lr, weight_decay, COPY, REMAINDER)
        _store(_address(tensor + 11, tl.uint8, WHOLE) + index, digits, inside, WHOLE)
    theta = stepped
    if TELEMETRY:
        _store_sums(sums, sign, g, m, theta, inside, WHOLE)
    m = m * beta2 + g * rest2
    if REMAINDER:
        _store(params, _upper(theta), inside, WHOLE)
        _store(remainders, _unless_nan(theta).to(tl.int16), inside, WHOLE)
    else:
        _store_fp32(params, theta, inside, WHOLE)
    if PACKED:
        codes, scales = _quantize(m, inside, WHOLE)
        _store(momenta, codes, inside, WHOLE)
        _store(scale_pointers, scales, known, WHOLE)
    else:
        _store_fp32(momenta, m, inside, WHOLE)
    if COPY:
        _store_fp32(_address(tensor + 3, tl.uint16, WHOLE) + index, theta, inside, WHOLE)


@triton.jit(do_not_specialize=["lr", "weight_decay", "grad_scale", "skip"])
def lion_kernel(
    table,  # int64 [tensors, COLUMNS]
    tensor_of,  # int32 [programs]: the tensor of each program
    lr,  # these are fp32 numbers; lr, weight_decay and grad_scale may be addresses of one, see ON_DEVICE
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,
    weight_decay,
    grad_scale,
    skip,  # int32 [1]: if it is not 0, nothing changes
    sums,  # fp64 [programs, 6] with TELEMETRY
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    REMAINDER: tl.constexpr,
    PACKED: tl.constexpr,  # momentum in int8
    TELEMETRY: tl.constexpr,
    DIGITS: tl.constexpr,  # write what other ranks need to repeat the step
    ON_DEVICE: tl.constexpr,  # sum of 1 if lr, 2 if weight_decay, 4 if grad_scale is an address
    WHOLE: tl.constexpr,  # every block is full and begins at a multiple of 16 bytes in every role
    SIZE: tl.constexpr,
):
    if tl.load(skip) == 0:
        program = tl.program_id(0)
        tensor = table + COLUMNS * tl.load(tensor_of + program).to(tl.int64)
        if WHOLE:
            index, scale_index = _whole_block(program + tl.load(tensor + 9), PACKED, SIZE)
            inside, known = index, scale_index  # not used
        else:
            index, scale_index, inside, known = _any_block(program + tl.load(tensor + 10), tensor, PACKED, SIZE)
        _update(
            tensor,
            index,
            inside,
            scale_index,
            known,
            _number(lr, ON_DEVICE & 1),
            beta1,
            rest1,
            beta2,
            rest2,
            _number(weight_decay, ON_DEVICE & 2),
            _number(grad_scale, ON_DEVICE & 4),
            sums + 6 * program.to(tl.int64),
            PARAM,
            GRAD,
            MOMENTUM,
            COPY,
            REMAINDER,
            PACKED,
            TELEMETRY,
            DIGITS,
            WHOLE,
        )
