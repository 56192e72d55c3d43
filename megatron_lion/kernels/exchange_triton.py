"""Triton kernels of the exchange, which :mod:`megatron_lion.kernels.exchange_gpu` launches."""

import torch
import triton
import triton.language as tl

from megatron_lion.exchange import message, trits
from megatron_lion.exchange.digits import FORMATS

ROW = tl.constexpr(trits.GROUP_BYTES)
ROWS = tl.constexpr(trits.DIGITS)
GROUP = tl.constexpr(trits.GROUP)
CHUNK = tl.constexpr(message.CHUNK)
FP32 = tl.constexpr(FORMATS.index((torch.float32, False)))
BF16 = tl.constexpr(FORMATS.index((torch.bfloat16, False)))
BF16_HALF_AWAY = tl.constexpr(FORMATS.index((torch.bfloat16, True)))
FP16 = tl.constexpr(FORMATS.index((torch.float16, False)))


@triton.jit
def _widen(code, FORMAT: tl.constexpr):
    """fp32 of parameters that were read from memory: fp32, or codes in int16."""
    if FORMAT == FP32:
        value = code
    elif FORMAT == FP16:
        value = code.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _round(value, FORMAT: tl.constexpr):
    """Codes in int32, of which the lower 16 bits count."""
    if FORMAT == BF16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int32)
        code = tl.where(value == value, nearest_even, 0x7FC0)
    elif FORMAT == BF16_HALF_AWAY:
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        code = (bits + 0x8000) >> 16
    else:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        code = tl.where(value == value, bits, 0x7E00)
    return code


@triton.jit
def _stepped(theta, sign, lr, weight_decay):
    return theta - (sign + theta * weight_decay) * lr


@triton.jit
def _digit(old, new, sign, lr, weight_decay, FORMAT: tl.constexpr):
    """The digits, int32, of elements that were ``old`` and are ``new`` in memory; ``sign`` is fp32."""
    digit = sign.to(tl.int32) & 3
    if FORMAT != FP32:
        guess = _round(_stepped(_widen(old, FORMAT), sign, lr, weight_decay), FORMAT)
        residual = (new.to(tl.int32) - guess) & 0xFFFF
        digit = tl.where(((residual + 1) & 0xFFFF) > 2, 0x80, digit | ((residual & 3) << 2))
    return digit


@triton.jit
def _total(values):
    return tl.reduce(values.to(tl.int64), None, tl.standard._sum_combine)


@triton.jit
def _summands(code, index, FORMAT: tl.constexpr):
    """What elements with number ``index`` in their shard add to the checksum, modulo 2^32."""
    if FORMAT == FP32:
        bits = tl.where(code == code, code.to(tl.int32, bitcast=True), 0x7FC00000)
    else:
        bits = code.to(tl.int32) & 0xFFFF
    return bits * (2 * index + 1).to(tl.int32)


@triton.jit
def digits_kernel(old, new, sign, out, lr, weight_decay, count, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < count
    before = tl.load(old + index, mask=inside, other=0)
    after = tl.load(new + index, mask=inside, other=0)
    s = tl.load(sign + index, mask=inside, other=0).to(tl.float32)
    digit = _digit(before, after, s, lr, weight_decay, FORMAT)
    tl.store(out + index, digit.to(tl.uint8), mask=inside)


@triton.jit
def pack_kernel(
    digits,
    params,
    signs,  # packed
    residuals,  # packed
    checksum,  # int64 [1], receives what is added modulo 2^32
    count,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (GROUPS * ROW) + tl.arange(0, GROUPS * ROW)
    inside_plane = byte < (count + GROUP - 1) // GROUP * ROW
    first = byte // ROW * GROUP + byte % ROW
    sign_byte = tl.full((GROUPS * ROW,), 0, tl.int32)
    residual_byte = tl.full((GROUPS * ROW,), 0, tl.int32)
    summands = tl.full((GROUPS * ROW,), 0, tl.int64)
    power = 1
    for row in tl.static_range(ROWS):
        index = first + row * ROW
        inside = index < count
        digit = tl.load(digits + index, mask=inside, other=0).to(tl.int32)
        code = tl.load(params + index, mask=inside, other=0)
        sign_byte += ((digit + 1) & 3) * power
        residual_byte += (((digit >> 2) + 1) & 3) * power
        summands += tl.where(inside, _summands(code, index, FORMAT), 0)
        power *= 3
    tl.store(signs + byte, sign_byte.to(tl.uint8), mask=inside_plane)
    if FORMAT != FP32:
        tl.store(residuals + byte, residual_byte.to(tl.uint8), mask=inside_plane)
    tl.atomic_add(checksum, _total(summands))


@triton.jit
def count_kernel(digits, counts, count, SIZE: tl.constexpr):
    """The exceptions in each block."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    digit = tl.load(digits + index, mask=index < count, other=0).to(tl.int32)
    tl.store(counts + tl.program_id(0), _total(digit >> 7))


@triton.jit
def table_kernel(digits, params, counts, ends, offsets, values, count, capacity, SIZE: tl.constexpr):
    """Write the exceptions of each block where those of the blocks before it end."""
    block = tl.program_id(0)
    found = tl.load(counts + block)
    if found > 0:
        index = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        mark = tl.load(digits + index, mask=index < count, other=0).to(tl.int32) >> 7
        position = tl.load(ends + block) - found + tl.associative_scan(mark, 0, tl.standard._sum_combine) - 1
        kept = (mark != 0) & (position < capacity)
        code = tl.load(params + index, mask=kept, other=0)
        tl.store(offsets + position, (index % CHUNK).to(tl.int16), mask=kept)
        tl.store(values + position, code, mask=kept)


@triton.jit
def _replay_tile(
    params, signs, residuals, first, last, group, lr, weight_decay, FORMAT: tl.constexpr, GROUPS: tl.constexpr,
    UPDATED: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Replay elements ``first`` to ``last`` of a shard in ``GROUPS`` groups from number ``group`` on, all with WHOLE.

    Returns their part of the checksum.
    """
    byte = group * ROW + tl.arange(0, GROUPS * ROW)
    index = byte // ROW * GROUP + byte % ROW
    sign_byte = tl.full((GROUPS * ROW,), 0, tl.int32)
    residual_byte = tl.full((GROUPS * ROW,), 0, tl.int32)
    if UPDATED:
        touched = WHOLE | (byte // ROW * GROUP < last)
        sign_byte = tl.load(signs + byte, mask=touched, other=0).to(tl.int32)
        if FORMAT != FP32:
            residual_byte = tl.load(residuals + byte, mask=touched, other=0).to(tl.int32)
    summands = tl.full((GROUPS * ROW,), 0, tl.int64)
    for _ in tl.static_range(ROWS):
        inside = WHOLE | ((index >= first) & (index < last))
        code = tl.load(params + index, mask=inside, other=0)
        if UPDATED:
            sign = (sign_byte % 3 - 1).to(tl.float32)
            theta = _stepped(_widen(code, FORMAT), sign, lr, weight_decay)
            code = theta if FORMAT == FP32 else (_round(theta, FORMAT) + residual_byte % 3 - 1).to(tl.int16)
            tl.store(params + index, code, mask=inside)
        summands += tl.where(inside, _summands(code, index, FORMAT), 0)
        sign_byte = sign_byte // 3
        residual_byte = residual_byte // 3
        index += ROW
    return _total(summands)


@triton.jit
def replay_kernel(
    params,
    messages,
    segments,  # int64 [segments, 4]: shard, first and last element of its message, number of its run or -1 between runs
    program_segment,  # int32 [programs]
    program_group,  # int64 [programs]: the first of its groups
    rates,  # fp32 [runs, 2]: lr and weight decay
    valid,  # int32 [ranks]
    checksums,  # int64 [ranks], receive what is added modulo 2^32
    shard_numel,
    start,  # of the messages' elements in a shard
    message_bytes,
    signs_at,  # where the packed trits are in a message
    residuals_at,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    segment = segments + 4 * tl.load(program_segment + tl.program_id(0)).to(tl.int64)
    group = tl.load(program_group + tl.program_id(0))
    rank = tl.load(segment)
    first = tl.load(segment + 1)
    last = tl.load(segment + 2)
    run = tl.load(segment + 3)
    if tl.load(valid + rank) != 0:
        shard = params + rank * shard_numel + start
        message = messages + rank * message_bytes
        signs = message + signs_at
        residuals = message + residuals_at
        whole = (group * GROUP >= first) & ((group + GROUPS) * GROUP <= last)
        if run < 0:
            total = _replay_tile(shard, signs, residuals, first, last, group, 0.0, 0.0, FORMAT, GROUPS, False, False)
        else:
            lr = tl.load(rates + 2 * run)
            weight_decay = tl.load(rates + 2 * run + 1)
            if whole:
                total = _replay_tile(
                    shard, signs, residuals, first, last, group, lr, weight_decay, FORMAT, GROUPS, True, True
                )
            else:
                total = _replay_tile(
                    shard, signs, residuals, first, last, group, lr, weight_decay, FORMAT, GROUPS, True, False
                )
        tl.atomic_add(checksums + rank, total)


@triton.jit
def replace_kernel(
    params,
    messages,  # in 16-bit words
    counts,  # int64 [ranks, chunks]: exceptions
    ends,  # int64 [ranks, chunks]: sums of counts
    valid,  # int32 [ranks]
    checksums,  # int64 [ranks]
    shard_numel,
    start,  # of the messages' elements in a shard
    numel,  # of a message
    message_words,
    offsets_at,  # where the table is in a message, in words
    values_at,
    chunks,
    SIZE: tl.constexpr,
):
    """Write the exceptions of one chunk over what was replayed, and mend the checksum."""
    rank = tl.program_id(0) // chunks
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    count = tl.load(counts + tl.program_id(0))
    if (tl.load(valid + rank) != 0) & (count > 0):
        shard = params + rank.to(tl.int64) * shard_numel + start
        message = messages + rank.to(tl.int64) * message_words
        begin = tl.load(ends + tl.program_id(0)) - count
        added = tl.full((SIZE,), 0, tl.int64)
        for first in range(0, count, SIZE):
            entry = first + tl.arange(0, SIZE)
            offset = tl.load(message + offsets_at + begin + entry, mask=entry < count, other=0).to(tl.int64) & 0xFFFF
            index = chunk * CHUNK + offset
            inside = (entry < count) & (index < numel)
            value = tl.load(message + values_at + begin + entry, mask=inside, other=0)
            replayed = tl.load(shard + index, mask=inside, other=0)
            change = (value.to(tl.int32) & 0xFFFF) - (replayed.to(tl.int32) & 0xFFFF)
            added += tl.where(inside, change * (2 * index + 1).to(tl.int32), 0)
            tl.store(shard + index, value, mask=inside)
        tl.atomic_add(checksums + rank, _total(added))
