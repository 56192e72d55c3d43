"""Triton kernels of packed gradients, which :mod:`megatron_lion.kernels.reduce_gpu` launches."""

import triton
import triton.language as tl

from megatron_lion.exchange import blocks
from megatron_lion.kernels.exchange_triton import BF16, _round, _widen

BLOCK = tl.constexpr(blocks.BLOCK)
HALF = tl.constexpr(blocks.BLOCK // 2)
THRESHOLD = tl.constexpr(blocks.THRESHOLD)
INT8, INT4, TERNARY = (tl.constexpr(blocks.CODES.index(code)) for code in ("int8", "int4", "ternary"))
AS_INT8, AS_BF16 = tl.constexpr(1), tl.constexpr(2)
# Added to a float below 2^22 and taken off again, it leaves the nearest integer, ties to even.
SHIFT = tl.constexpr(12582912.0)
NAN = tl.constexpr(0x7FC0)


@triton.jit
def _add(values):
    """Sums along axis 1, in the interpreter too, which cannot run tl.sum."""
    return tl.reduce(values, 1, tl.standard._sum_combine)


@triton.jit
def _sum(values, TILE: tl.constexpr):
    """The sums of rows of 64, in the order of the reference: halves are added until one element is left."""
    values = _add(tl.reshape(values, (TILE, 2, 32)))
    values = _add(tl.reshape(values, (TILE, 2, 16)))
    values = _add(tl.reshape(values, (TILE, 2, 8)))
    values = _add(tl.reshape(values, (TILE, 2, 4)))
    values = _add(tl.reshape(values, (TILE, 2, 2)))
    return _add(values)


@triton.jit
def _quantize(value, CODE: tl.constexpr, TILE: tl.constexpr):
    """Integers, fp32 [TILE, 64], and the codes of bf16 scales, int32 [TILE], of ``value``, fp32 [TILE, 64]."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.reduce(bits, 1, tl.standard._elementwise_max)  # where a NaN is larger than all numbers
    magnitude = bits.to(tl.float32, bitcast=True)
    if CODE == TERNARY:
        threshold = _sum(magnitude, TILE) * (1.0 / BLOCK) * THRESHOLD
        kept = magnitude > threshold[:, None]
        count = tl.maximum(_add(kept.to(tl.int32)), 1)
        exact = tl.div_rn(_sum(tl.where(kept, magnitude, 0.0), TILE), count.to(tl.float32))
        scale = _round(exact, BF16)
        integer = tl.where(kept, tl.where(value > 0.0, 1.0, -1.0), 0.0)
    else:
        LEVELS: tl.constexpr = 127.0 if CODE == INT8 else 7.0
        exact = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full((TILE,), LEVELS, tl.float32))
        scale = _round(exact, BF16)
        divisor = (scale << 16).to(tl.float32, bitcast=True)[:, None] + tl.full((TILE, BLOCK), 0.0, tl.float32)
        quotient = tl.where(divisor > 0.0, tl.div_rn(value, divisor), 0.0)
        clamped = tl.minimum(tl.maximum(quotient, -LEVELS), LEVELS)
        integer = (clamped + SHIFT) - SHIFT
    is_finite = (largest < 0x7F800000) & ((exact.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000)
    return tl.where(is_finite[:, None], integer, 0.0), tl.where(is_finite, scale & 0xFFFF, NAN)


@triton.jit
def write_kernel(
    gradient,
    scales,  # codes of bf16
    packed,
    residual,  # int8, or codes of bf16
    residual_scales,
    count,
    FORMAT: tl.constexpr,
    CODE: tl.constexpr,
    FEEDBACK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,  # blocks that share a byte: 5 of trits
):
    tile = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    number = (count + BLOCK - 1) // BLOCK
    byte = tl.full((TILE, BLOCK), 0, tl.int32)
    power = 1
    for row in tl.static_range(ROWS):
        block = tile * ROWS + row
        index = block[:, None] * BLOCK + column[None, :]
        inside = index < count
        is_block = block < number
        value = _widen(tl.load(gradient + index, mask=inside, other=0), FORMAT)
        if FEEDBACK == AS_INT8:
            code = tl.load(residual_scales + block, mask=is_block, other=0)
            kept = tl.load(residual + index, mask=inside, other=0).to(tl.float32)
            value += kept * _widen(code, BF16)[:, None]
        if FEEDBACK == AS_BF16:
            value += _widen(tl.load(residual + index, mask=inside, other=0), BF16)
        integer, scale = _quantize(value, CODE, TILE)
        tl.store(scales + block, scale.to(tl.int16), mask=is_block)
        if FEEDBACK != 0:
            left = value - integer * (scale << 16).to(tl.float32, bitcast=True)[:, None]
            if FEEDBACK == AS_INT8:
                rest, rest_scale = _quantize(left, INT8, TILE)
                tl.store(residual + index, rest.to(tl.int8), mask=is_block[:, None] & (index >= 0))
                tl.store(residual_scales + block, rest_scale.to(tl.int16), mask=is_block)
            else:
                tl.store(residual + index, _round(left, BF16).to(tl.int16), mask=inside)
        if CODE == INT8:
            tl.store(packed + index, integer.to(tl.int8), mask=is_block[:, None] & (index >= 0))
        elif CODE == INT4:
            weight = tl.where(column < HALF, 1, 16)[None, :]
            halves = _add(tl.reshape((integer.to(tl.int32) & 15) * weight, (TILE, 2, HALF)))
            place = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
            tl.store(packed + place, halves.to(tl.int8), mask=is_block[:, None] & (place >= 0))
        else:
            byte += (integer.to(tl.int32) + 1) * power
            power *= 3
    if CODE == TERNARY:
        place = tile[:, None] * BLOCK + column[None, :]
        tl.store(packed + place, byte.to(tl.int8), mask=(tile * ROWS < number)[:, None] & (place >= 0))


@triton.jit
def sum_kernel(
    own,
    messages,  # int8 [others, bytes]
    total,
    others,
    message_bytes,
    scales_at,  # where the sections are in a message
    codes_at,
    rank,
    count,
    FORMAT: tl.constexpr,
    CODE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    number = (count + BLOCK - 1) // BLOCK
    power = 1
    for row in tl.static_range(ROWS):
        block = tile * ROWS + row
        index = block[:, None] * BLOCK + column[None, :]
        inside = index < count
        is_block = block < number
        mine = _widen(tl.load(own + index, mask=inside, other=0), FORMAT)
        summed = tl.full((TILE, BLOCK), 0.0, tl.float32)
        message = messages
        for other in range(others):
            if other == rank:
                summed += mine
            lower = tl.load(message + scales_at + 2 * block, mask=is_block, other=0).to(tl.int32) & 0xFF
            upper = tl.load(message + scales_at + 2 * block + 1, mask=is_block, other=0).to(tl.int32) & 0xFF
            scale = ((upper << 24) | (lower << 16)).to(tl.float32, bitcast=True)
            if CODE == INT8:
                integer = tl.load(message + codes_at + index, mask=inside, other=0).to(tl.float32)
            elif CODE == INT4:
                place = block[:, None] * HALF + (column % HALF)[None, :]
                nibbles = tl.load(message + codes_at + place, mask=inside, other=0).to(tl.int32)
                shift = tl.where(column < HALF, 28, 24)[None, :]
                integer = ((nibbles << shift) >> 28).to(tl.float32)
            else:
                place = tile[:, None] * BLOCK + column[None, :]
                trits = tl.load(message + codes_at + place, mask=inside, other=0).to(tl.int32) & 0xFF
                integer = (trits // power % 3 - 1).to(tl.float32)
            summed += integer * scale[:, None]
            message += message_bytes
        if rank == others:
            summed += mine
        tl.store(total + index, summed, mask=inside)
        power *= 3
