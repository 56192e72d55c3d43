"""The digits of a step, and the exact replay that they allow, against Lion's own update."""

import math

import pytest
import torch

from megatron_lion.exchange.digits import EXCEPTION, cast_code, sign_digits, step, trits_of
from megatron_lion.exchange.message import Run, WireFormat, replay_
from megatron_lion.precision import join_master, split_master
from megatron_lion.update import lion_sign, lion_step
from tests.exchange.exchange_cases import (
    BF16,
    COMPILED,
    CPU,
    EVERY_FORMAT,
    EVERY_KERNEL,
    FP16,
    FP32,
    REFERENCE,
    SIXTEEN_BITS,
    capacity_for,
    cast,
    exceptions_in,
    messages_of,
    on_device,
    one_step,
    same_bits,
    special_values,
)


@EVERY_FORMAT
def test_the_step_is_that_of_the_update(dtype, half_away):
    """Also for a weight decay and learning rate that fp32 rounds, signs of zero, infinities and NaN."""
    theta = special_values().repeat(3)
    grad = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(len(theta) // 3)
    expected, _ = lion_step(theta, grad, torch.zeros_like(theta), lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    assert same_bits(step(theta, lion_sign(grad, torch.zeros_like(theta), 0.9), 1e-3, 0.1), expected)


@SIXTEEN_BITS
def test_cast_code_is_the_cast_of_the_run(dtype, half_away):
    values = torch.cat([special_values(), torch.randn(10_000) * 10.0 ** torch.empty(10_000).uniform_(-44, 38)])
    ours, runs = cast_code(values, dtype, half_away=half_away), cast(values, dtype, half_away)
    finite = ~values.isnan()
    assert torch.equal(ours[finite], runs.view(torch.int16)[finite])
    assert runs[~finite].isnan().all() and len(set(ours[~finite].tolist())) == 1


@SIXTEEN_BITS
def test_digits_say_sign_and_residual_or_exception(dtype, half_away):
    runs = [Run(0, 20_000, 1e-3, 0.1)]
    old, new, signs, digits = one_step(20_000, runs, dtype, half_away)
    guess = cast_code(step(old, signs, 1e-3, 0.1), dtype, half_away=half_away)
    difference = (new.view(torch.int16).int() - guess.int() + 0x8000) % 0x10000 - 0x8000
    exception = difference.abs() > 1
    assert torch.equal(digits >= EXCEPTION, exception) and 0 < exception.sum() < 1000
    sent_signs, residuals = trits_of(digits)
    assert torch.equal(residuals, torch.where(exception, 0, difference).to(torch.int8))
    assert torch.equal(sent_signs, torch.where(exception, 0, signs))
    assert {-1, 0, 1} == set(residuals.tolist())


@COMPILED
@EVERY_FORMAT
@pytest.mark.parametrize(("lr", "weight_decay"), [(1e-3, 0.1), (0.5, 0.0), (2.0**-9, 2.0**-3), (0.0, 0.1)])
def test_each_kernel_has_the_digits_of_the_reference(kernels, dtype, half_away, lr, weight_decay):
    old, new, signs, _ = one_step(2001, [Run(0, 2001, lr, weight_decay)], dtype, half_away)
    new[:3] = new[:3].roll(1)
    rates = {"lr": lr, "weight_decay": weight_decay, "half_away": half_away}
    actual = kernels.sign_digits(*on_device(kernels, old, new, signs), **rates)
    assert torch.equal(actual.cpu(), sign_digits(old, new, signs, **rates))


@SIXTEEN_BITS
def test_the_cpu_kernel_casts_every_code_and_what_is_around_it(dtype, half_away):
    """Digits of steps to each of the 65,536 codes' numbers and their neighbors in fp32, ties included."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    half = (every.float().view(torch.int32) & -0x10000) | 0x8000 if dtype == BF16 else None
    around = [every.float()] if half is None else [every.float(), half.view(torch.float32)]
    if dtype == FP16:  # 13 bits are dropped: the tie is 0x1000 above
        around.append((every.float().view(torch.int32) | 0x1000).view(torch.float32))
    for values in around:
        for offset in (-1, 0, 1):
            master = (values.view(torch.int32) + offset).view(torch.float32)
            new = cast(master, dtype, half_away)
            for lr in (0.0, 2.0**-12):  # 0 widens and rounds each code, a step of a power of two makes ties
                rates = {"lr": lr, "weight_decay": 0.5, "half_away": half_away}
                sign = torch.ones(len(new), dtype=torch.int8)
                assert torch.equal(CPU.sign_digits(every, new, sign, **rates), sign_digits(every, new, sign, **rates))


class Ordinary:
    """Lion as a run has it: the owner's master or remainder, its momentum, and the parameters that it gathers."""

    def __init__(self, master, dtype, half_away):
        self.dtype, self.half_away = dtype, half_away
        self.params = cast(master, dtype, half_away).clone()
        self.master = master.clone() if dtype != FP32 else self.params
        self.momentum = torch.zeros_like(master)

    def step(self, grad, lr, weight_decay):
        """Returns the signs, and the parameters before the step."""
        rates = {"lr": lr, "beta1": 0.9, "beta2": 0.95, "weight_decay": weight_decay}
        old, signs = self.params.clone(), lion_sign(grad, self.momentum, 0.9)
        self.master, self.momentum = lion_step(self.master, grad, self.momentum, **rates)
        if self.half_away:
            self.params, remainder = split_master(self.master)
            self.master = join_master(self.params, remainder)
        else:
            self.params = self.master.to(self.dtype)
        return signs, old


def follow(kernels, dtype, half_away, numel, steps, seed):
    """Replay ``steps`` steps of one shard from its messages, and compare all bits of each. Returns the exceptions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.02, 1e-4, 1.0, 0.0]).repeat_interleave(numel // 4)
    run = Ordinary(torch.randn(numel, generator=generator) * scale, dtype, half_away)
    form = WireFormat(dtype, numel, capacity_for(dtype, numel), half_away)
    replica, exceptions = run.params.clone(), []
    for number in range(steps):
        grad = torch.randn(numel, generator=generator) * 10 ** torch.empty(numel).uniform_(-6, 0, generator=generator)
        grad[: numel // 20] = 0.0
        lr = 0.05 if number % 50 == 49 else 3e-3 * (1 + math.cos(math.pi * number / steps)) / 2 + 1e-6
        weight_decay = (0.1, 0.0)[number % 7 == 3]
        signs, old = run.step(grad, lr, weight_decay)
        rates = {"lr": lr, "weight_decay": weight_decay}
        digits = kernels.sign_digits(old, run.params, signs, half_away=half_away, **rates)
        messages = messages_of(kernels, run.params, digits, form, 1)
        assert kernels.replay_(replica, messages, [Run(0, numel, lr, weight_decay)], form).tolist() == [0]
        assert same_bits(replica, run.params), f"step {number}"
        exceptions.append(exceptions_in(messages[0]))
    return exceptions


@EVERY_FORMAT
@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=["reference", "cpu"])
def test_a_replica_follows_random_masters_for_many_steps(kernels, dtype, half_away):
    exceptions = follow(kernels, dtype, half_away, numel=4000, steps=60, seed=1)
    assert any(exceptions) == (dtype != FP32)


@pytest.mark.slow
@EVERY_FORMAT
@pytest.mark.parametrize("seed", range(4))
def test_a_replica_follows_large_shards_for_200_steps(dtype, half_away, seed):
    follow(CPU, dtype, half_away, numel=60_000, steps=200, seed=seed)


@SIXTEEN_BITS
def test_any_parameters_at_all_are_replayed_exactly(dtype, half_away):
    """New parameters that no step of Lion makes become exceptions: a message is exact whatever the owner did."""
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randint(-(2**15), 2**15, (5000,), generator=generator).to(torch.int16).view(dtype) for _ in "ab")
    runs = [Run(0, 5000, 1e-3, 0.1)]
    digits = sign_digits(old, new, torch.ones(5000), lr=1e-3, weight_decay=0.1, half_away=half_away)
    form = WireFormat(dtype, 5000, 5000, half_away)
    messages = messages_of(REFERENCE, new, digits, form, 1)
    assert replay_(old, messages, runs, form).tolist() == [0] and same_bits(old, new)
    assert exceptions_in(messages[0]) > 4900


@EVERY_KERNEL
@pytest.mark.parametrize("numel", [0, 1, 999, 200_000])
def test_exceptions_are_counted(kernels, numel):
    (digits,) = on_device(kernels, torch.randint(0, 256, (numel,), dtype=torch.uint8))
    count = kernels.count_exceptions(digits)
    assert (count.dtype, count.shape, count.item()) == (torch.int64, (), sum(digit >= 128 for digit in digits.tolist()))
