"""Digits, messages and their replay on a GPU with Triton, with the bits of :mod:`megatron_lion.exchange`.

Nothing here waits for the device. Tested in Triton's interpreter (``TRITON_INTERPRET=1``) and compiled for GPUs; it has
not been run on one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange.digits import FORMATS
from megatron_lion.exchange.message import CHUNK, HEADER_BYTES, INVALID, Run, WireFormat, check_runs
from megatron_lion.exchange.trits import GROUP, GROUP_BYTES
from megatron_lion.kernels import exchange_triton as kernels

SIZE = 1024  # elements of a program that takes them in order
GROUPS = 8  # of a program that packs or unpacks trits
ENTRIES = 256  # of the table, which a program takes at a time


@torch.no_grad()
def sign_digits_gpu(
    old: Tensor, new: Tensor, sign: Tensor, *, lr: float, weight_decay: float, half_away: bool = False
) -> Tensor:
    """:func:`megatron_lion.exchange.digits.sign_digits` in one launch."""
    digits = torch.empty(old.shape, dtype=torch.uint8, device=old.device)
    if old.numel():
        kernels.digits_kernel[(_cdiv(old.numel(), SIZE),)](
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
def write_message_gpu_(message: Tensor, digits: Tensor, params: Tensor, form: WireFormat) -> None:
    """:func:`megatron_lion.exchange.message.write_message_` in one to three launches."""
    form.check(message, digits, params)
    parts = form.sections(message)
    message[sum(form.section_bytes()[:3]) :].zero_()  # the table
    parts.header.zero_()
    if form.numel == 0:
        return
    codes = _codes(params)
    kernels.pack_kernel[(_cdiv(len(parts.signs), GROUPS * GROUP_BYTES),)](
        digits, codes, parts.signs, parts.residuals, parts.header[1:], form.numel, FORMAT=form.kind, GROUPS=GROUPS
    )
    parts.header[1] &= 0xFFFFFFFF
    if form.dtype == torch.float32:
        return
    blocks, blocks_a_chunk = _cdiv(form.numel, SIZE), CHUNK // SIZE
    counts = torch.zeros(form.chunks * blocks_a_chunk, dtype=torch.int64, device=params.device)
    kernels.count_kernel[(blocks,)](digits, counts, form.numel, SIZE=SIZE)
    parts.counts.copy_(counts.view(form.chunks, blocks_a_chunk).sum(1))
    ends = counts.cumsum(0)
    parts.header[:1].copy_(ends[-1:])
    kernels.table_kernel[(blocks,)](
        digits, codes, counts, ends, parts.offsets, parts.values, form.numel, form.capacity, SIZE=SIZE
    )


@torch.no_grad()
def replay_gpu_(
    params: Tensor, messages: Tensor, runs: Sequence[Run], form: WireFormat, *, own: int | None = None, start: int = 0
) -> Tensor:
    """:func:`megatron_lion.exchange.message.replay_` in one or two launches.

    The first call with the bounds of some runs copies them to the device, later calls copy only the rates.
    """
    shard_numel = form.check_shards(params, messages, start)
    check_runs(runs, params.numel())
    ranks, device = len(messages), params.device
    starts = [sum(form.section_bytes()[:section]) for section in range(6)]
    headers = messages[:, :HEADER_BYTES].contiguous().view(torch.int64)
    counts = messages[:, starts[3] : starts[3] + 4 * form.chunks].contiguous().view(torch.int32).view(ranks, -1).long()
    ends = counts.cumsum(1)
    total = counts.sum(1)
    valid = (total == headers[:, 0]) & (total <= form.capacity) & (counts >= 0).all(1)
    if own is not None:
        valid[own] = False
    checksums = torch.zeros(ranks, dtype=torch.int64, device=device)
    bounds = tuple((run.start, run.stop) for run in runs)
    segments, program_segment, program_group = _tables(
        device, bounds, Shards(ranks, shard_numel, start, form.numel, own)
    )
    codes, valid_flags = _codes(params), valid.to(torch.int32)
    if len(program_segment):
        kernels.replay_kernel[(len(program_segment),)](
            codes,
            messages,
            segments,
            program_segment,
            program_group,
            torch.tensor([run[2:] for run in runs] or [(0.0, 0.0)], dtype=torch.float32).to(device, non_blocking=True),
            valid_flags,
            checksums,
            shard_numel,
            start,
            form.nbytes,
            starts[1],
            starts[2],
            FORMAT=form.kind,
            GROUPS=GROUPS,
            enable_fp_fusion=False,
        )
    if form.capacity and form.chunks:
        kernels.replace_kernel[(ranks * form.chunks,)](
            codes,
            messages.view(torch.int16),
            counts,
            ends,
            valid_flags,
            checksums,
            shard_numel,
            start,
            form.numel,
            form.nbytes // 2,
            starts[4] // 2,
            starts[5] // 2,
            form.chunks,
            SIZE=ENTRIES,
        )
    mismatches = torch.where(valid, (checksums - headers[:, 1]) & 0xFFFFFFFF, INVALID)
    if own is not None:
        mismatches[own] = 0
    return mismatches


def _cdiv(number: int, size: int) -> int:
    return -(-number // size)


def _codes(params: Tensor) -> Tensor:
    """fp32 as it is, 16-bit parameters as int16: Triton's interpreter has no bf16 of its own."""
    return params if params.dtype == torch.float32 else params.view(torch.int16)


class Shards(NamedTuple):
    """``ranks`` shards of ``shard_numel`` elements. Messages have ``numel`` from ``start`` on of each but ``own``."""

    ranks: int
    shard_numel: int
    start: int
    numel: int
    own: int | None


def _segments(bounds: Sequence[tuple[int, int]], shards: Shards) -> Iterator[tuple[int, int, int, int]]:
    """Shard, first and last element of its message, and number of the run, or -1 between runs."""
    ranks, shard_numel, start, numel, own = shards
    cuts = [(begin, end, number) for number, (begin, end) in enumerate(bounds)]
    ends = [0, *(end for _, end in bounds)]
    gaps = [(end, begin, -1) for end, (begin, _) in zip(ends, [*bounds, (ranks * shard_numel, 0)], strict=True)]
    for begin, end, run in sorted(cuts + gaps):
        for rank in range(begin // shard_numel, -(-end // shard_numel)) if end > begin else ():
            origin = rank * shard_numel + start
            first, last = max(begin - origin, 0), min(end - origin, numel)
            if rank != own and first < last:
                yield rank, first, last, run


@functools.lru_cache(maxsize=4096)
def _tables(device: torch.device, bounds: tuple[tuple[int, int], ...], shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """The segments, and for each program of the replay its segment and its first group."""
    segments = torch.tensor(list(_segments(bounds, shards) if shards.numel else ()), dtype=torch.int64).view(-1, 4)
    first_group = segments[:, 1] // GROUP
    programs = -(-(-(-segments[:, 2] // GROUP) - first_group) // GROUPS)
    segment = torch.repeat_interleave(torch.arange(len(segments)), programs)
    before = programs.cumsum(0) - programs
    group = first_group[segment] + (torch.arange(len(segment)) - before[segment]) * GROUPS
    return segments.to(device), segment.to(torch.int32).to(device), group.to(device)
