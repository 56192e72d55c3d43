"""Digits, messages and their replay on a GPU with Triton, with the bits of :mod:`megatron_lion.exchange`.

Nothing here waits for the device. Tested in Triton's interpreter (``TRITON_INTERPRET=1``) and compiled for GPUs; it has
not been run on one.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lion.exchange import message as reference
from megatron_lion.exchange import trits
from megatron_lion.exchange.digits import FORMATS
from megatron_lion.exchange.message import Run, WireFormat, check_runs

SIZE = 1024  # elements of a program that takes them in order
GROUPS = 8  # of a program that packs or unpacks trits
BLOCKS_A_CHUNK = reference.CHUNK // SIZE
ROW = tl.constexpr(trits.GROUP_BYTES)
ROWS = tl.constexpr(trits.DIGITS)
GROUP = tl.constexpr(trits.GROUP)
CHUNK = tl.constexpr(reference.CHUNK)
FP32 = tl.constexpr(FORMATS.index((torch.float32, False)))
BF16 = tl.constexpr(FORMATS.index((torch.bfloat16, False)))
BF16_HALF_AWAY = tl.constexpr(FORMATS.index((torch.bfloat16, True)))


@triton.jit
def _widen(code, FORMAT: tl.constexpr):
    """fp32 of parameters that were read from memory: fp32, or codes in int16."""
    if FORMAT == FP32:
        value = code
    elif FORMAT == BF16 or FORMAT == BF16_HALF_AWAY:
        value = (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = code.to(tl.float16, bitcast=True).to(tl.float32)
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
def _digits_kernel(old, new, sign, out, lr, weight_decay, count, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < count
    before = tl.load(old + index, mask=inside, other=0)
    after = tl.load(new + index, mask=inside, other=0)
    s = tl.load(sign + index, mask=inside, other=0).to(tl.float32)
    digit = _digit(before, after, s, lr, weight_decay, FORMAT)
    tl.store(out + index, digit.to(tl.uint8), mask=inside)


@triton.jit
def _pack_kernel(
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
    sign_byte = tl.zeros((GROUPS * ROW,), tl.int32)
    residual_byte = tl.zeros((GROUPS * ROW,), tl.int32)
    summands = tl.zeros((GROUPS * ROW,), tl.int64)
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
def _count_kernel(digits, counts, count, SIZE: tl.constexpr):
    """The exceptions in each block."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    digit = tl.load(digits + index, mask=index < count, other=0).to(tl.int32)
    tl.store(counts + tl.program_id(0), _total(digit >> 7))


@triton.jit
def _table_kernel(digits, params, counts, ends, offsets, values, count, capacity, SIZE: tl.constexpr):
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
    sign_byte = tl.zeros((GROUPS * ROW,), tl.int32)
    residual_byte = tl.zeros((GROUPS * ROW,), tl.int32)
    if UPDATED:
        touched = WHOLE | (byte // ROW * GROUP < last)
        sign_byte = tl.load(signs + byte, mask=touched, other=0).to(tl.int32)
        if FORMAT != FP32:
            residual_byte = tl.load(residuals + byte, mask=touched, other=0).to(tl.int32)
    summands = tl.zeros((GROUPS * ROW,), tl.int64)
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
def _replay_kernel(
    params,
    messages,
    segments,  # int64 [segments, 4]: shard, first and last element in it, number of its run or -1 between runs
    program_segment,  # int32 [programs]
    program_group,  # int64 [programs]: the first of its groups
    rates,  # fp32 [runs, 2]: lr and weight decay
    valid,  # int32 [ranks]
    checksums,  # int64 [ranks], receive what is added modulo 2^32
    numel,
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
        shard = params + rank * numel
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
def _replace_kernel(
    params,
    messages,  # in 16-bit words
    counts,  # int64 [ranks, chunks]: exceptions
    ends,  # int64 [ranks, chunks]: sums of counts
    valid,  # int32 [ranks]
    checksums,  # int64 [ranks]
    numel,
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
        shard = params + rank.to(tl.int64) * numel
        message = messages + rank.to(tl.int64) * message_words
        begin = tl.load(ends + tl.program_id(0)) - count
        added = tl.zeros((SIZE,), tl.int64)
        for start in range(0, count, SIZE):
            entry = start + tl.arange(0, SIZE)
            offset = tl.load(message + offsets_at + begin + entry, mask=entry < count, other=0).to(tl.int64) & 0xFFFF
            index = chunk * CHUNK + offset
            inside = (entry < count) & (index < numel)
            value = tl.load(message + values_at + begin + entry, mask=inside, other=0)
            replayed = tl.load(shard + index, mask=inside, other=0)
            change = (value.to(tl.int32) & 0xFFFF) - (replayed.to(tl.int32) & 0xFFFF)
            added += tl.where(inside, change * (2 * index + 1).to(tl.int32), 0)
            tl.store(shard + index, value, mask=inside)
        tl.atomic_add(checksums + rank, _total(added))


@torch.no_grad()
def sign_digits_triton(
    old: Tensor, new: Tensor, sign: Tensor, *, lr: float, weight_decay: float, half_away: bool = False
) -> Tensor:
    """:func:`megatron_lion.exchange.digits.sign_digits` in one launch."""
    digits = torch.empty(old.shape, dtype=torch.uint8, device=old.device)
    if old.numel():
        _digits_kernel[(triton.cdiv(old.numel(), SIZE),)](
            _codes(old.contiguous()),
            _codes(new.contiguous()),
            sign.to(torch.int8).contiguous(),
            digits,
            float(lr),
            float(weight_decay),
            old.numel(),
            FORMAT=FORMATS.index((old.dtype, half_away)),
            SIZE=SIZE,
            enable_fp_fusion=False,
        )
    return digits


@torch.no_grad()
def write_message_triton_(message: Tensor, digits: Tensor, params: Tensor, form: WireFormat) -> None:
    """:func:`megatron_lion.exchange.message.write_message_` in one to three launches."""
    form.check(params, message[None], digits)
    parts = form.sections(message)
    message[sum(form.section_bytes()[:3]) :].zero_()  # the table
    parts.header.zero_()
    if form.numel == 0:
        return
    codes = _codes(params)
    _pack_kernel[(triton.cdiv(len(parts.signs), GROUPS * trits.GROUP_BYTES),)](
        digits, codes, parts.signs, parts.residuals, parts.header[1:], form.numel, FORMAT=form.kind, GROUPS=GROUPS
    )
    parts.header[1] &= 0xFFFFFFFF
    if form.dtype == torch.float32:
        return
    blocks = triton.cdiv(form.numel, SIZE)
    counts = torch.zeros(form.chunks * BLOCKS_A_CHUNK, dtype=torch.int64, device=params.device)
    _count_kernel[(blocks,)](digits, counts, form.numel, SIZE=SIZE)
    parts.counts.copy_(counts.view(form.chunks, BLOCKS_A_CHUNK).sum(1))
    ends = counts.cumsum(0)
    parts.header[:1].copy_(ends[-1:])
    _table_kernel[(blocks,)](
        digits, codes, counts, ends, parts.offsets, parts.values, form.numel, form.capacity, SIZE=SIZE
    )


@torch.no_grad()
def replay_triton_(
    params: Tensor, messages: Tensor, runs: Sequence[Run], form: WireFormat, *, own: int | None = None
) -> Tensor:
    """:func:`megatron_lion.exchange.message.replay_` in one or two launches.

    The first call with the bounds of some runs copies them to the device, later calls copy only the rates.
    """
    form.check(params, messages)
    check_runs(runs)
    ranks, device = len(messages), params.device
    starts = [sum(form.section_bytes()[:section]) for section in range(6)]
    headers = messages[:, : reference.HEADER_BYTES].contiguous().view(torch.int64)
    counts = messages[:, starts[3] : starts[3] + 4 * form.chunks].contiguous().view(torch.int32).view(ranks, -1).long()
    ends = counts.cumsum(1)
    total = counts.sum(1)
    valid = (total == headers[:, 0]) & (total <= form.capacity) & (counts >= 0).all(1)
    if own is not None:
        valid[own] = False
    checksums = torch.zeros(ranks, dtype=torch.int64, device=device)
    bounds = tuple((run.start, run.stop) for run in runs)
    segments, program_segment, program_group = _tables(device, bounds, ranks, form.numel, own)
    codes, valid_flags = _codes(params), valid.to(torch.int32)
    if len(program_segment):
        _replay_kernel[(len(program_segment),)](
            codes,
            messages,
            segments,
            program_segment,
            program_group,
            torch.tensor([run[2:] for run in runs] or [(0.0, 0.0)], dtype=torch.float32).to(device, non_blocking=True),
            valid_flags,
            checksums,
            form.numel,
            form.nbytes,
            starts[1],
            starts[2],
            FORMAT=form.kind,
            GROUPS=GROUPS,
            enable_fp_fusion=False,
        )
    if form.capacity and form.chunks:
        _replace_kernel[(ranks * form.chunks,)](
            codes,
            messages.view(torch.int16),
            counts,
            ends,
            valid_flags,
            checksums,
            form.numel,
            form.nbytes // 2,
            starts[4] // 2,
            starts[5] // 2,
            form.chunks,
            SIZE=256,
        )
    mismatches = torch.where(valid, (checksums - headers[:, 1]) & 0xFFFFFFFF, reference.INVALID)
    if own is not None:
        mismatches[own] = 0
    return mismatches


def _codes(params: Tensor) -> Tensor:
    """fp32 as it is, 16-bit parameters as int16: Triton's interpreter has no bf16 of its own."""
    return params if params.dtype == torch.float32 else params.view(torch.int16)


def _segments(
    bounds: Sequence[tuple[int, int]], ranks: int, numel: int, own: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """Shard, first and last element in it, and number of the run, or -1 between runs: of all shards but ``own``."""
    cuts = [(start, stop, number) for number, (start, stop) in enumerate(bounds)]
    ends = [0, *(stop for _, stop in bounds)]
    gaps = [(end, start, -1) for end, (start, _) in zip(ends, [*bounds, (ranks * numel, 0)], strict=True)]
    for start, stop, run in sorted(cuts + gaps):
        for rank in range(start // numel, -(-stop // numel)) if stop > start else ():
            if rank != own:
                yield rank, max(start - rank * numel, 0), min(stop - rank * numel, numel), run


@functools.lru_cache(maxsize=4096)
def _tables(
    device: torch.device, bounds: tuple[tuple[int, int], ...], ranks: int, numel: int, own: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The segments, and for each program of the replay its segment and its first group."""
    segments = torch.tensor(list(_segments(bounds, ranks, numel, own) if numel else ()), dtype=torch.int64).view(-1, 4)
    first_group = segments[:, 1] // trits.GROUP
    programs = -(-(-(-segments[:, 2] // trits.GROUP) - first_group) // GROUPS)
    segment = torch.repeat_interleave(torch.arange(len(segments)), programs)
    before = programs.cumsum(0) - programs
    group = first_group[segment] + (torch.arange(len(segment)) - before[segment]) * GROUPS
    return segments.to(device), segment.to(torch.int32).to(device), group.to(device)
