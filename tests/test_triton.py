"""The Triton kernel has the bits of the reference: in Triton's interpreter, and on a GPU where there is one."""

import collections
import importlib
import itertools
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lion import kernels
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.precision import BlockLayout
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import lion_update_
from tests.kernel_calls import reference, run
from tests.test_kernels import DYADIC, LANGUAGE, assert_same_bits, compare, problem, with_special_values
from tests.test_packed_kernels import MIXES, compare_packed, packed
from tests.test_telemetry import sums

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:  # Triton looks when a kernel is defined
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from megatron_lion.kernels import triton_lion

FP32, BF16 = torch.float32, torch.bfloat16
update = triton_lion.lion_update_triton_


@pytest.mark.parametrize("dtypes", list(itertools.product([FP32, BF16], repeat=3)))
def test_each_mix_of_stored_dtypes_has_the_bits_of_the_reference(dtypes):
    lists = with_special_values(problem([1, 0, 4099, 1023, 1024, 1025], FP32, DEVICE))
    lists = [[t.to(dtype) for t in tensors] for tensors, dtype in zip(lists, dtypes, strict=True)]
    compare(update, lists, steps=2, **LANGUAGE)


@pytest.mark.parametrize("hyper", [DYADIC, {**LANGUAGE, "weight_decay": 0.0}, {**LANGUAGE, "grad_scale": 0.37}])
def test_ties_and_a_folded_gradient_scale_have_the_bits_of_the_reference(hyper):
    compare(update, with_special_values(problem([4099], FP32, DEVICE)), steps=2, **hyper)


def test_gradients_that_nearly_cancel_the_momentum_have_the_bits_of_the_reference():
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(10_001, generator=generator)
    wiggle = 1 + torch.randint(-3, 4, m.shape, generator=generator) * torch.finfo(FP32).eps
    compare(update, [[t.to(DEVICE)] for t in (torch.randn_like(m), -9 * m * wiggle, m)], steps=1, **LANGUAGE)


def test_unaligned_slices_leave_the_elements_between_them():
    flats = [tensors[0] for tensors in problem([3011], FP32, DEVICE)]
    before = [flat.clone() for flat in flats]
    cuts = [(1, 4), (4, 4), (5, 1030), (1031, 3010)]
    compare(update, [[flat[start:stop] for start, stop in cuts] for flat in flats], **LANGUAGE)
    for flat, old in zip(flats, before, strict=True):
        assert_same_bits([flat[[0, 4, 1030, 3010]]], [old[[0, 4, 1030, 3010]]])


def test_the_copy_is_the_new_parameter_rounded_to_bf16():
    params, grads, exp_avgs = with_special_values(problem([4099, 31], FP32, DEVICE))
    copies = [torch.ones(param.shape, dtype=BF16, device=DEVICE) for param in params]
    run(update, params, grads, exp_avgs, model_copies=copies, **LANGUAGE)
    assert_same_bits(copies, [param.to(BF16) for param in params])


def test_hyperparameters_on_the_device_give_the_bits_of_numbers():
    lists = problem([2000, 3], FP32, DEVICE)
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    numbers = {"lr": 1e-3, "weight_decay": 0.1, "grad_scale": 0.37}
    on_device = {name: torch.tensor(value, device=DEVICE) for name, value in numbers.items()}
    run(update, *lists, beta1=0.9, beta2=0.95, **on_device)
    run(update, *expected, beta1=0.9, beta2=0.95, **numbers)
    for actual, right in zip(lists, expected, strict=True):
        assert_same_bits(actual, right)


@pytest.mark.parametrize("on_device", [True, False])
def test_lion_follows_what_is_written_to_its_tensors(on_device, monkeypatch):
    """The Triton kernel reads them on the device, the others on the host."""
    chosen = update if on_device else lion_update_
    monkeypatch.setattr(kernels, "choose", lambda *args, **kwargs: chosen)
    params, grads, _ = problem([1027, 3], FP32, DEVICE)
    expected = [param.clone() for param in params]
    momenta = [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    lr, weight_decay, scale = (torch.tensor(value, device=DEVICE) for value in (1e-3, 0.1, 1.0))
    lion = ShardedLion(params, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    lion.grad_scale, lion.skip = scale, torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for rate, decay, factor, skip in ((1e-3, 0.1, 1.0, 0), (5e-4, 0.2, 0.5, 1), (2e-4, 0.3, 0.25, 0)):
        for tensor, value in ((lr, rate), (weight_decay, decay), (scale, factor), (lion.skip, skip)):
            tensor.fill_(value)
        rounded = {"lr": lr.item(), "weight_decay": weight_decay.item(), "grad_scale": factor}
        lion.step()
        if not skip:
            reference(expected, grads, momenta, beta1=0.9, beta2=0.95, **rounded)
        assert_same_bits(params, expected)


@pytest.mark.parametrize("skip", [0, 1])
def test_the_skip_flag_leaves_everything_as_it_was(skip):
    lists = problem([2000, 3], FP32, DEVICE)
    before = [[tensor.clone() for tensor in tensors] for tensors in lists]
    run(update, *lists, skip=torch.tensor([skip], dtype=torch.int32, device=DEVICE), **LANGUAGE)
    unchanged = all(torch.equal(a, b) for i in (0, 2) for a, b in zip(lists[i], before[i], strict=True))
    assert unchanged == bool(skip)


@pytest.mark.parametrize("mix", [(FP32, FP32, FP32), ("remainder", BF16, torch.int8)], ids=str)
def test_the_sums_of_a_step_are_the_references_and_change_no_bit(mix):
    lists = problem([4099, 0, 33], FP32, DEVICE)
    lists[1][0][:7] = 0
    call = packed(lists, *mix)
    ours, right = (asdict(sums(kernel, call, grad_scale=0.3, beta1=0.5)) for kernel in (update, lion_update_))
    for name, value in right.items():  # what is added is the same but for the order, all else exactly
        assert ours[name] == (pytest.approx(value, rel=1e-12) if name in ("l1", "l2_squared", "inner") else value)
    compare_packed(update, call, telemetry=Telemetry())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_sums(bad):
    call = {name: [torch.ones(40, device=DEVICE)] for name in ("masters", "grads", "exp_avgs")}
    call["masters"][0][3] = call["grads"][0][5] = bad
    telemetry = sums(update, call)
    assert telemetry.linf_param == float("inf")
    assert telemetry.l1 != telemetry.l1 or telemetry.l1 == float("inf")
    assert telemetry.zeros == int(bad != bad)


def test_a_skipped_first_step_leaves_no_state_of_its_gradient(monkeypatch):
    """Momentum is to begin with the first gradient that is not skipped, whether or not the kernel reads the flag."""
    monkeypatch.setattr(kernels, "choose", lambda *args, **kwargs: update)
    (param,), (grad,), _ = problem([100], FP32, DEVICE)
    other = param.clone()
    lion, never_skipped = (ShardedLion([p], lr=1e-3, momentum_init="gradient") for p in (param, other))
    lion.skip = torch.ones(1, dtype=torch.int32, device=DEVICE)
    param.grad = torch.full_like(param, float("nan"))
    lion.step()
    lion.skip.zero_()
    param.grad = other.grad = grad
    for optimizer in (lion, never_skipped):
        optimizer.step()
    assert_same_bits([param, lion.state[param]["exp_avg"]], [other, never_skipped.state[other]["exp_avg"]])


def test_a_skipped_step_sums_nothing():
    telemetry = Telemetry()
    skip = torch.ones(1, dtype=torch.int32, device=DEVICE)
    run(update, *problem([2000], FP32, DEVICE), skip=skip, telemetry=telemetry, **LANGUAGE)
    assert telemetry == Telemetry()


@pytest.mark.parametrize("tensors", [1, 5, 40])
def test_one_launch_however_many_tensors(tensors, monkeypatch):
    launches = []
    kernel = triton_lion.lion_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_lion, "lion_kernel", Counted())
    compare(update, problem([7] * tensors, FP32, DEVICE), steps=1, **LANGUAGE)
    assert len(launches) == 1


def test_a_second_call_copies_no_table_to_the_device():
    """What a captured graph needs: addresses and blocks are on the device from the first call on those tensors on."""
    lists = problem([2000, 3], FP32, DEVICE)
    counts, lr = [], torch.tensor(1e-3, device=DEVICE)
    for tensors in (lists, lists, [[t[:1] for t in ts] for ts in lists], lists):
        before = triton_lion._tables.cache_info().misses
        with TensorsFromHost() as made:
            run(update, *tensors, lr=lr, beta1=0.9, beta2=0.95, weight_decay=0.1)
        counts.append((triton_lion._tables.cache_info().misses - before, made.count > 0))
    assert counts == [(1, True), (0, False), (1, True), (0, False)]


class TensorsFromHost(TorchDispatchMode):
    """Counts the tensors that are made of Python numbers on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_packed_state_has_the_bits_of_the_reference(mix):
    lists = with_special_values(problem([1, 0, 5003, 31, 32, 33, 1055], FP32, DEVICE))
    compare_packed(update, packed(lists, *mix, copies=True), grad_scale=0.37)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("mix", "telemetry"),
    [*itertools.product([(FP32, FP32, FP32), (BF16, BF16, BF16), *MIXES], [False]), (MIXES[2], True)],
    ids=str,
)
def test_no_program_loads_an_address_that_it_has_stored_to(mix, telemetry, monkeypatch):
    """On a GPU another thread may do the load, and nothing makes it wait for the store."""
    call = packed(problem([1, 0, 1055], FP32), *mix, copies=True)
    programs = Programs(monkeypatch)
    run(update, **call, **LANGUAGE, telemetry=Telemetry() if telemetry else None)
    assert len(programs.stored) == 3
    written = set().union(*programs.stored.values())
    assert len(written & programs.loaded) >= 2 * 1056, "parameters and momenta are loaded and stored"
    assert not programs.loaded_after_a_store


class Programs:
    """Records the addresses that each program of the interpreted kernel loads and stores."""

    def __init__(self, monkeypatch):
        self.loaded, self.stored, self.loaded_after_a_store = set(), collections.defaultdict(set), set()
        builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def recorded_load(builder, pointers, mask, *rest):
            addresses = self._addresses(pointers, mask)
            self.loaded |= addresses
            self.loaded_after_a_store |= addresses & self.stored[builder.grid_idx]
            return load(builder, pointers, mask, *rest)

        def recorded_store(builder, pointers, value, mask, *rest):
            self.stored[builder.grid_idx] |= self._addresses(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", recorded_load)
        monkeypatch.setattr(builder, "create_masked_store", recorded_store)

    @staticmethod
    def _addresses(pointers, mask):
        return set(pointers.data[mask.data].tolist())


@pytest.mark.parametrize("row", [1, 33, 96, 1000])
def test_pieces_that_begin_and_end_anywhere_have_the_bits_of_the_reference(row):
    blocks = [BlockLayout(start, row) for start in (0, row - row % 32, 7, 3 * row + 40)]
    compare_packed(update, packed(problem([900, 300, 200, 0], FP32, DEVICE), "remainder", BF16, torch.int8, blocks))


def test_momentum_of_every_magnitude_is_quantized_as_the_reference_does():
    grads = torch.randn(277, 32, generator=torch.Generator().manual_seed(3)) * 2.0 ** torch.arange(-149, 128)[:, None]
    lists = [[tensor.to(DEVICE)] for tensor in (torch.zeros_like(grads), grads, torch.zeros_like(grads))]
    compare_packed(update, packed(lists, FP32, FP32, torch.int8), steps=1, beta2=0.0)


def test_unsupported_tensors_are_refused():
    for tensor, said in ((torch.ones(3, 4).t(), "only contiguous"), (torch.ones(3).double(), "does not support")):
        with pytest.raises(ValueError, match=said):
            run(update, *([tensor.to(DEVICE).clone()] for _ in range(3)), **LANGUAGE)


def test_empty_lists_are_accepted():
    run(update, [], [], [], **LANGUAGE)
