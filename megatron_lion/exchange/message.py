"""The message that the owner of a shard, or of a part of it, sends after a step, and its replay by the receivers.

A message is one uint8 tensor. Its size depends only on the :class:`WireFormat`, so the messages of all ranks can be
gathered by one collective::

    header     int64 [2]          number of exceptions, checksum of the elements after the step
    signs      uint8              packed trits s
    residuals  uint8              packed trits r                                (16-bit parameters)
    counts     int32 [chunks]     exceptions in each chunk of 65,536 elements   (16-bit parameters)
    offsets    uint16 [capacity]  their offsets inside the chunks, ascending    (16-bit parameters)
    values     uint16 [capacity]  their new codes                               (16-bit parameters)

filled with zeros to a multiple of 16 bytes. The number of exceptions may exceed the capacity. Such a message says so in
its header and replaces nothing: the shard must be sent in full.

The checksum covers every element of the message, whether the step changed it or not, with codes read as unsigned
numbers and every NaN of fp32 as the same one::

    sum over i of code_i (2 i + 1)  modulo 2^32
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange.digits import CODES, EXCEPTION, FORMATS, cast_code, step, trits_of
from megatron_lion.exchange.trits import pack_trits, packed_bytes, unpack_trits

CHUNK = 65536  # elements that a 16-bit offset reaches
HEADER_BYTES = 16
ALIGNMENT = 16
INVALID = -1  # "mismatch" of a message that cannot be replayed


class Run(NamedTuple):
    """Elements ``start`` to ``stop`` of a bucket, which one step updates with the same ``lr`` and ``weight_decay``."""

    start: int
    stop: int
    lr: float
    weight_decay: float

    def within(self, start: int, stop: int) -> "Run":
        """The part of the run in elements ``start`` to ``stop``, counted from ``start``; it may be empty."""
        first, last = max(self.start, start), min(self.stop, stop)
        return self._replace(start=first - start, stop=max(last, first) - start)


class Sections(NamedTuple):
    """Views of the parts of a message. fp32 parameters have only ``header`` and ``signs``; the rest is empty."""

    header: Tensor
    signs: Tensor
    residuals: Tensor
    counts: Tensor
    offsets: Tensor
    values: Tensor


@dataclass(frozen=True)
class WireFormat:
    """How ``numel`` elements of each shard, of ``dtype`` fp32, bf16 or fp16, are sent.

    ``capacity`` is the largest number of exceptions that a message holds. ``half_away`` says that bf16 parameters are
    rounded half away from zero. Raises ValueError for another dtype, for ``half_away`` with another dtype than bf16,
    and for a capacity with fp32.
    """

    dtype: torch.dtype
    numel: int
    capacity: int = 0
    half_away: bool = False

    def __post_init__(self) -> None:
        if (self.dtype, self.half_away) not in FORMATS:
            raise ValueError(
                f"{self.dtype} with half_away={self.half_away} is not supported: use fp32, bf16 or fp16, and half_away "
                "with bf16 only"
            )
        if self.capacity and self.dtype == torch.float32:
            raise ValueError(f"fp32 parameters have no exceptions, so the capacity is 0, not {self.capacity}")

    @property
    def kind(self) -> int:
        """The number of the format of the parameters among ``FORMATS``."""
        return FORMATS.index((self.dtype, self.half_away))

    @property
    def chunks(self) -> int:
        """Chunks that exceptions are counted in."""
        return 0 if self.dtype == torch.float32 else -(-self.numel // CHUNK)

    @property
    def nbytes(self) -> int:
        """Bytes of a message."""
        return -(-sum(self.section_bytes()) // ALIGNMENT) * ALIGNMENT

    def section_bytes(self) -> tuple[int, ...]:
        """Bytes of each section of a message, in the order of :class:`Sections`."""
        plane = packed_bytes(self.numel)
        residuals = 0 if self.dtype == torch.float32 else plane
        return HEADER_BYTES, plane, residuals, 4 * self.chunks, 2 * self.capacity, 2 * self.capacity

    def sections(self, message: Tensor) -> Sections:
        """The parts of ``message``, uint8 [nbytes], contiguous and aligned to 8 bytes."""
        sizes = self.section_bytes()
        parts = torch.split(message[: sum(sizes)], list(sizes))
        dtypes = (torch.int64, torch.uint8, torch.uint8, torch.int32, torch.int16, torch.int16)
        return Sections(*(part.view(dtype) for part, dtype in zip(parts, dtypes, strict=True)))

    def new_messages(self, ranks: int, device: torch.device | str = "cpu") -> Tensor:
        """Room for the messages of ``ranks`` shards, uint8 [ranks, nbytes], as one gather fills it."""
        return torch.empty(ranks, self.nbytes, dtype=torch.uint8, device=device)

    def check(self, message: Tensor, digits: Tensor, params: Tensor) -> None:
        """Raise ValueError unless ``params`` have this format, and ``message`` and ``digits`` are theirs."""
        _check_tensor("message", message, torch.uint8, (self.nbytes,))
        _check_tensor("digits", digits, torch.uint8, (self.numel,))
        _check_tensor("params", params, self.dtype, (self.numel,))

    def check_shards(self, params: Tensor, messages: Tensor, start: int) -> int:
        """The number of elements of each shard in ``params``.

        Raises ValueError unless ``messages`` are of this format and ``params`` is one shard for each of them, with
        elements ``start`` to ``start + numel`` in it.
        """
        ranks = len(messages)
        shard = params.numel() // ranks
        _check_tensor("messages", messages, torch.uint8, (ranks, self.nbytes))
        _check_tensor("params", params, self.dtype, (ranks * shard,))
        if not 0 <= start <= shard - self.numel:
            raise ValueError(f"messages of elements {start} to {start + self.numel} do not fit shards of {shard}")
        return shard


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not (tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()):
        raise ValueError(
            f"{name} must be contiguous, {dtype} {list(shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )


def check_runs(runs: Sequence[Run], numel: int) -> None:
    """Raise ValueError unless ``runs`` ascend within ``numel`` elements and do not overlap."""
    end = 0
    for run in runs:
        if not end <= run.start <= run.stop <= numel:
            raise ValueError(f"runs must ascend within {numel} elements and not overlap, but {run} follows {end}")
        end = run.stop


def checksum(params: Tensor) -> Tensor:
    """The checksum of elements ``params``, int64 without dimensions, in [0, 2^32)."""
    codes = params.contiguous().view(CODES[params.dtype])
    if params.dtype == torch.float32:
        codes = codes.masked_fill(params.isnan(), 0x7FC00000)
    unsigned = codes.long() & (1 << 8 * params.element_size()) - 1
    weights = 2 * torch.arange(params.numel(), device=params.device) + 1
    return (unsigned * weights).sum() & 0xFFFFFFFF


@torch.no_grad()
def write_message_(message: Tensor, digits: Tensor, params: Tensor, form: WireFormat) -> None:
    """Write a message into ``message``, uint8 [form.nbytes]; nothing else is modified.

    Args:
        message: is overwritten.
        digits: uint8 [form.numel], of :func:`megatron_lion.exchange.digits.sign_digits`, and 0 where the step changed
            nothing.
        params: a shard after the step, or a part of it, [form.numel] of form.dtype.
        form: the format that the receivers use too.

    Raises ValueError where sizes or dtypes do not fit ``form``.
    """
    form.check(message, digits, params)
    message.zero_()
    parts = form.sections(message)
    signs, residuals = trits_of(digits)
    parts.signs.copy_(pack_trits(signs))
    parts.header[1] = checksum(params)
    if form.dtype == torch.float32:
        return
    parts.residuals.copy_(pack_trits(residuals))
    exceptions = (digits >= EXCEPTION).nonzero().flatten()
    parts.header[0] = exceptions.numel()
    parts.counts.copy_(torch.bincount(exceptions // CHUNK, minlength=form.chunks))
    kept = exceptions[: form.capacity]
    parts.offsets[: kept.numel()] = (kept % CHUNK).to(torch.int16)  # wraps: the bits are those of a uint16
    parts.values[: kept.numel()] = params.view(torch.int16)[kept]


@torch.no_grad()
def replay_(
    params: Tensor, messages: Tensor, runs: Sequence[Run], form: WireFormat, *, own: int | None = None, start: int = 0
) -> Tensor:
    """Make one step on the shards of a bucket from the messages of their owners. ``params`` is modified in place.

    Args:
        params: the bucket before the step, as many equal shards of form.dtype as there are messages, with the bits that
            its owners had.
        messages: uint8 [ranks, form.nbytes], the message of each shard in turn.
        runs: where ``params`` is updated and with which lr and weight decay, in ascending order and without overlap.
            The elements between them are not modified.
        form: the format of the messages.
        own: the shard that this rank owns. It is not modified, and its message is not read.
        start: where in each shard the messages' elements begin. The others are not modified.

    Returns:
        int64 [ranks], on the device of ``params``: 0 where a message's elements have their owner's checksum after the
        replay, 0 for ``own``. Where a message has more exceptions than it can hold, or its table contradicts its
        header, nothing of the shard is modified and the number is not 0 either. A shard with a number other than 0 must
        be sent in full.

    Raises ValueError where sizes or dtypes do not fit ``form``, or runs overlap.
    """
    shard_numel = form.check_shards(params, messages, start)
    check_runs(runs, params.numel())
    mismatches = torch.zeros(len(messages), dtype=torch.int64, device=params.device)
    for rank in range(len(messages)):
        if rank != own:
            first = rank * shard_numel + start
            last = first + form.numel
            within = [run.within(first, last) for run in runs]
            mismatches[rank] = _replay_elements_(params[first:last], form.sections(messages[rank]), within, form)
    return mismatches


def _replay_elements_(shard: Tensor, parts: Sections, runs: Sequence[Run], form: WireFormat) -> Tensor | int:
    exceptions, total = int(parts.header[0]), int(parts.counts.sum())
    if exceptions != total or not 0 <= exceptions <= form.capacity:
        return INVALID
    signs = unpack_trits(parts.signs, form.numel)
    residuals = unpack_trits(parts.residuals, form.numel) if form.dtype != torch.float32 else None
    for run in runs:
        elements = slice(run.start, run.stop)
        old, sign = shard[elements], signs[elements]
        if residuals is None:
            old.copy_(step(old, sign, run.lr, run.weight_decay))
        else:
            guess = cast_code(step(old, sign, run.lr, run.weight_decay), form.dtype, half_away=form.half_away)
            old.view(torch.int16).copy_(guess + residuals[elements])
    if exceptions:
        chunk = torch.repeat_interleave(parts.counts.long())
        index = chunk * CHUNK + (parts.offsets[:exceptions].long() & 0xFFFF)
        inside = index < form.numel  # always, unless the message was damaged
        shard.view(torch.int16)[index[inside]] = parts.values[:exceptions][inside]
    return (checksum(shard) - parts.header[1]) & 0xFFFFFFFF
