"""Messages of shards: every kernel writes and replays them with the bits of the reference."""

import pytest
import torch

from megatron_lion.exchange.message import CHUNK, Run, WireFormat, checksum
from megatron_lion.exchange.trits import pack_trits
from tests.exchange.exchange_cases import (
    BF16,
    COMPILED,
    CPU,
    DEVICE,
    EVERY_FORMAT,
    EVERY_KERNEL,
    FP16,
    FP32,
    REFERENCE,
    SIXTEEN_BITS,
    TRITON,
    capacity_for,
    exceptions_in,
    messages_of,
    on_device,
    one_step,
    same_bits,
)


def replayed(kernels, old, messages, runs, form, **options):
    """The parameters after a replay by ``kernels``, and its mismatches."""
    params, messages = on_device(kernels, old.clone(), messages)
    mismatches = kernels.replay_(params, messages, runs, form, **options)
    return params.cpu(), mismatches.tolist()


RUNS = [Run(3, 700, 1e-3, 0.1), Run(700, 701, 0.1, 0.0), Run(760, 2300, 3e-4, 0.5), Run(2300, 3890, 2e-3, 0.0)]


@EVERY_KERNEL
@EVERY_FORMAT
def test_runs_that_cross_shards_are_replayed_and_the_rest_is_untouched(kernels, dtype, half_away):
    numel, ranks, own = 1300, 3, 1
    old, new, _, digits = one_step(numel * ranks, RUNS, dtype, half_away)
    form = WireFormat(dtype, numel, capacity_for(dtype, 400), half_away)
    messages = messages_of(kernels, new, digits, form, ranks)
    actual, mismatches = replayed(kernels, old, messages, RUNS, form, own=own)
    expected = new.clone()
    expected[own * numel : (own + 1) * numel] = old[own * numel : (own + 1) * numel]
    assert same_bits(actual, expected) and mismatches == [0] * ranks


@EVERY_KERNEL
@EVERY_FORMAT
def test_shards_are_replayed_in_parts(kernels, dtype, half_away):
    """Each part has its own messages, and may end anywhere in a run."""
    numel, ranks, own = 1300, 3, 1
    old, new, _, digits = one_step(numel * ranks, RUNS, dtype, half_away)
    params, (new_of, digits_of) = old, (new.view(ranks, numel), digits.view(ranks, numel))
    for start, stop in ((0, 500), (500, 501), (501, 1300)):
        form = WireFormat(dtype, stop - start, capacity_for(dtype, 400), half_away)
        of_part = (new_of[:, start:stop].flatten(), digits_of[:, start:stop].flatten())
        messages = messages_of(kernels, *of_part, form, ranks)
        params, mismatches = replayed(kernels, params, messages, RUNS, form, own=own, start=start)
        assert mismatches == [0] * ranks
    expected = new.clone()
    expected[own * numel : (own + 1) * numel] = old[own * numel : (own + 1) * numel]
    assert same_bits(params, expected)


@COMPILED
@EVERY_FORMAT
def test_each_kernel_writes_the_messages_of_the_reference(kernels, dtype, half_away):
    _, new, _, digits = one_step(3900, RUNS, dtype, half_away)
    form = WireFormat(dtype, 1300, capacity_for(dtype, 401), half_away)
    expected = messages_of(REFERENCE, new, digits, form, 3)
    assert torch.equal(messages_of(kernels, new, digits, form, 3).cpu(), expected)
    if dtype != FP32:
        assert all(exceptions_in(message) > 0 for message in expected)


@EVERY_KERNEL
@EVERY_FORMAT
def test_every_length_of_a_shard(kernels, dtype, half_away):
    lengths = range(1001) if kernels is CPU and dtype == BF16 and not half_away else range(0, 1001, 37)
    for numel in (0, 1, 319, 321, 1000) if kernels is TRITON else lengths:
        runs = [Run(0, numel, 1e-3, 0.1)]
        old, new, _, digits = one_step(numel, runs, dtype, half_away, seed=numel, special=numel % 2 == 1)
        form = WireFormat(dtype, numel, capacity_for(dtype, numel), half_away)
        messages = messages_of(kernels, new, digits, form, 1)
        actual, mismatches = replayed(kernels, old, messages, runs, form)
        assert same_bits(actual, new) and mismatches == [0], numel


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_all_243_bytes_are_unpacked(kernels, dtype):
    """Zeros move by -s lr, and residuals add to the code."""
    form = WireFormat(dtype, 4 * 320)
    message = form.new_messages(1)[0].zero_()
    parts = form.sections(message)
    parts.signs[:243] = torch.arange(243, dtype=torch.uint8)
    parts.signs[243:] = 121
    if dtype != FP32:
        parts.residuals.copy_(parts.signs.flip(0))
    runs = [Run(0, form.numel, 1.0, 0.0)]
    expected = torch.zeros(form.numel, dtype=dtype)
    REFERENCE.replay_(expected, message[None], runs, form)
    actual, _ = replayed(kernels, torch.zeros(form.numel, dtype=dtype), message[None], runs, form)
    signs = (-expected.float()).round().to(torch.int8)
    assert same_bits(actual, expected) and torch.equal(pack_trits(signs)[:243], parts.signs[:243])


def with_exceptions(numel, at, dtype=BF16):
    """Parameters whose step has exceptions at these elements only."""
    runs = [Run(0, numel, 2.0**-6, 0.0)]
    old = torch.ones(numel, dtype=dtype)
    new = (old.float() - 2.0**-6).to(dtype)
    digits = torch.ones(numel, dtype=torch.uint8)  # s is 1, r is 0
    new[at] = torch.arange(len(at)).to(dtype) + 5
    digits[at] = 0x80
    return runs, old, new, digits


@pytest.fixture
def few_programs(monkeypatch):
    """Large programs for the Triton kernels: the interpreter's time goes by their number."""
    if TRITON is not None and DEVICE == "cpu":
        from megatron_lion.kernels import exchange_gpu

        monkeypatch.setattr(exchange_gpu, "SIZE", CHUNK // 2)
        monkeypatch.setattr(exchange_gpu, "GROUPS", 64)
        exchange_gpu._tables.cache_clear()
        yield
        exchange_gpu._tables.cache_clear()
    else:
        yield


@EVERY_KERNEL
def test_exceptions_at_the_borders_of_chunks(kernels, few_programs):
    """Chunk 1 has none."""
    at = [0, 1, CHUNK - 2, CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK - 1, 3 * CHUNK, 3 * CHUNK + 6]
    runs, old, new, digits = with_exceptions(3 * CHUNK + 7, at)
    form = WireFormat(BF16, len(old), capacity=16)
    messages = messages_of(kernels, new, digits, form, 1)
    parts = form.sections(messages[0])
    assert parts.counts.tolist() == [4, 0, 3, 2]
    offsets = [int(offset) & 0xFFFF for offset in parts.offsets[: len(at)]]
    assert offsets == [element % CHUNK for element in at]
    actual, mismatches = replayed(kernels, old, messages, runs, form)
    assert same_bits(actual, new) and mismatches == [0]


@EVERY_KERNEL
@SIXTEEN_BITS
@pytest.mark.slow
def test_shards_of_several_chunks_with_many_exceptions(kernels, dtype, half_away, few_programs):
    numel, ranks = 5 * CHUNK + 64 if kernels is not TRITON else CHUNK + 64, 2
    runs = [Run(start, start + 4000, 1e-2, 0.1) for start in range(11, numel * ranks - 4000, 4096)]
    old, new, _, digits = one_step(numel * ranks, runs, dtype, half_away)
    form = WireFormat(dtype, numel, numel // 10, half_away)
    messages = messages_of(kernels, new, digits, form, ranks)
    assert torch.equal(messages.cpu(), messages_of(REFERENCE, new, digits, form, ranks))
    assert exceptions_in(messages[0]) > 100
    actual, mismatches = replayed(kernels, old, messages, runs, form)
    assert same_bits(actual, new) and mismatches == [0] * ranks


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_the_cpu_kernel_change_nothing(threads):
    numel = 11 * CHUNK
    old, new, _, digits = one_step(numel, [Run(0, numel, 1e-2, 0.1)], BF16, False)
    form = WireFormat(BF16, numel, numel)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        messages = messages_of(CPU, new, digits, form, 1)
        actual, mismatches = replayed(CPU, old, messages, [Run(0, numel, 1e-2, 0.1)], form)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(messages, messages_of(REFERENCE, new, digits, form, 1))
    assert same_bits(actual, new) and mismatches == [0]


@EVERY_KERNEL
@pytest.mark.parametrize("capacity", [0, 3])
def test_more_exceptions_than_a_table_holds_are_reported_and_nothing_is_replayed(kernels, capacity):
    """The shard that overflows is left, the other is replayed."""
    numel = 640
    runs, old, new, digits = with_exceptions(2 * numel, [3, 4, 5, 9])
    form = WireFormat(BF16, numel, capacity)
    messages = messages_of(kernels, new, digits, form, 2)
    assert torch.equal(messages.cpu(), messages_of(REFERENCE, new, digits, form, 2))
    assert exceptions_in(messages[0]) == 4 > capacity
    actual, mismatches = replayed(kernels, old, messages, runs, form)
    assert mismatches[0] != 0 and mismatches[1] == 0
    assert same_bits(actual[:numel], old[:numel]) and same_bits(actual[numel:], new[numel:])


@EVERY_KERNEL
@EVERY_FORMAT
def test_a_replica_that_drifted_or_the_wrong_rates_fail_the_checksum(kernels, dtype, half_away):
    runs = [Run(0, 960, 1e-2, 0.1)]
    old, new, _, digits = one_step(960, runs, dtype, half_away, special=False)
    old[5] = 0.75  # a number that a step moves in every format
    new[5] = torch.tensor(0.75 - (1 + 0.075) * 1e-2).to(dtype)
    digits[5] = 1
    form = WireFormat(dtype, 960, capacity_for(dtype, 960), half_away)
    messages = messages_of(kernels, new, digits, form, 1)
    drifted = old.clone()
    drifted[5] = 0.5
    for params, its_runs in (
        (drifted, runs),
        (old, [Run(0, 960, 2e-2, 0.1)]),
        (old, [Run(0, 960, 1e-2, 0.3)]),
        (old, [Run(0, 959, 1e-2, 0.1)] if digits[959] else [Run(0, 5, 1e-2, 0.1), Run(6, 960, 1e-2, 0.1)]),
        (new, runs),
    ):
        assert replayed(kernels, params, messages, its_runs, form)[1] != [0]


@EVERY_KERNEL
def test_a_damaged_table_writes_nothing_outside_the_shard(kernels):
    numel = 700
    runs, old, new, digits = with_exceptions(numel, [3, 4, 5, 9])
    form = WireFormat(BF16, numel, capacity=8)
    messages = messages_of(kernels, new, digits, form, 1)
    room = torch.cat([old, torch.full((CHUNK,), 9.0, dtype=BF16)])
    (params,) = on_device(kernels, room.clone())
    form.sections(messages[0]).offsets[1] = numel + 1
    assert kernels.replay_(params[:numel], messages, runs, form).tolist() != [0]
    assert same_bits(params[numel:], room[numel:])
    form.sections(messages[0]).counts[0] = 8
    before = params.clone()
    assert kernels.replay_(params[:numel], messages, runs, form).tolist() != [0]
    assert same_bits(params, before)


@SIXTEEN_BITS
def test_the_checksum_sees_each_bit_and_the_order_of_elements(dtype, half_away):
    params = torch.randn(100).to(dtype)
    sums = {int(checksum(params))}
    for element in (0, 57, 99):
        for bit in range(16):
            changed = params.clone()
            changed.view(torch.int16)[element] ^= torch.tensor(1 << bit).to(torch.int16)
            sums.add(int(checksum(changed)))
    assert len(sums) == 1 + 3 * 16
    assert int(checksum(params.roll(1))) not in sums
    by_hand = sum((int(code) & 0xFFFF) * (2 * i + 1) for i, code in enumerate(params.view(torch.int16))) % 2**32
    assert by_hand in sums


def test_bits_on_the_wire():
    def bits(dtype, capacity):
        return WireFormat(dtype, 3_200_000, capacity).nbytes * 8 / 3_200_000

    assert bits(FP32, 0) == pytest.approx(1.6, abs=1e-3)
    assert bits(BF16, 0) == pytest.approx(3.2, abs=1e-3)
    assert bits(BF16, 32_000) - bits(BF16, 0) == pytest.approx(0.32)  # 32 bits for each of 1 % of the elements


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((torch.float64, 1), "float64"), ((FP16, 1, 0, True), "half_away"), ((FP32, 1, 2), "capacity is 0, not 2")],
)
def test_what_no_format_is(arguments, said):
    with pytest.raises(ValueError, match=said):
        WireFormat(*arguments)


@EVERY_KERNEL
def test_what_does_not_fit_the_format_is_refused(kernels):
    form = WireFormat(BF16, 320, 4)
    (params, digits) = on_device(kernels, torch.zeros(320, dtype=BF16), torch.zeros(320, dtype=torch.uint8))
    messages = form.new_messages(1, params.device)
    with pytest.raises(ValueError, match="params must be contiguous"):
        kernels.write_message_(messages[0], digits, params[:319], form)
    with pytest.raises(ValueError, match="digits must be contiguous"):
        kernels.write_message_(messages[0], digits.to(torch.int8), params, form)
    with pytest.raises(ValueError, match="messages must be contiguous"):
        kernels.replay_(params, messages[:, :-16], [], form)
    with pytest.raises(ValueError, match="messages of elements 1 to 321 do not fit shards of 320"):
        kernels.replay_(params, messages, [], form, start=1)
    for runs in ([Run(0, 5, 0.1, 0.0), Run(4, 6, 0.1, 0.0)], [Run(0, 321, 0.1, 0.0)], [Run(6, 5, 0.1, 0.0)]):
        with pytest.raises(ValueError, match="runs must ascend within 320"):
            kernels.replay_(params, messages, runs, form)


def test_autograd_sees_that_the_cpu_kernel_wrote():
    param = torch.ones(320, requires_grad=True)
    form = WireFormat(FP32, 320)
    messages = messages_of(REFERENCE, param.detach(), torch.ones(320, dtype=torch.uint8), form, 1)
    loss = (param * param).sum()
    CPU.replay_(param.detach(), messages, [Run(0, 320, 0.1, 0.0)], form)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_cpu_kernel_refuses_tensors_of_a_device():
    form = WireFormat(BF16, 320, 4)
    params, digits = torch.empty(320, dtype=BF16, device="meta"), torch.empty(320, dtype=torch.uint8, device="meta")
    messages = form.new_messages(1, "meta")
    with pytest.raises(ValueError, match="not on meta"):
        CPU.write_message_(messages[0], digits, params, form)
    with pytest.raises(ValueError, match="not on meta"):
        CPU.replay_(params, messages, [Run(0, 320, 0.1, 0.0)], form)
    with pytest.raises(ValueError, match="not on cpu, meta"):
        CPU.sign_digits(params, torch.zeros(320, dtype=BF16), torch.zeros(320), lr=0.1, weight_decay=0.0)
