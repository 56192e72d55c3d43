"""The Triton kernel has the bits of the reference: in Triton's interpreter, and on a GPU where there is one."""

import collections
import contextlib
import importlib
import itertools
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lion import LionError, kernels
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.precision import BlockLayout
from megatron_lion.step import StepTensors
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
    """Slices of 1,024 elements or more, with special values, that begin between and at multiples of 16 bytes."""
    flats = [tensors[0] for tensors in with_special_values(problem([5011], FP32, DEVICE))]
    before = [flat.clone() for flat in flats]
    cuts = [(1, 4), (4, 4), (5, 1030), (1031, 2900), (2904, 5010)]
    compare(update, [[flat[start:stop] for start, stop in cuts] for flat in flats], steps=2, **LANGUAGE)
    between = [0, 4, 1030, *range(2900, 2904), 5010]
    for flat, old in zip(flats, before, strict=True):
        assert_same_bits([flat[between]], [old[between]])


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


@pytest.mark.parametrize(
    "mix", [pytest.param((FP32, FP32, FP32), marks=pytest.mark.slow), ("remainder", BF16, torch.int8)], ids=str
)
def test_the_sums_of_a_step_are_the_references_and_change_no_bit(mix):
    lists = problem([4099, 0, 33, 1056], FP32, DEVICE)
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


class Launches:
    """Stands in for the kernel and records the grids and arguments of its launches."""

    def __init__(self, monkeypatch):
        self.kernel, self.made = triton_lion.lion_kernel, []
        monkeypatch.setattr(triton_lion, "lion_kernel", self)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.made.append((grid, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch

    @property
    def number(self):
        return len(self.made)


@pytest.mark.parametrize(("sizes", "whole"), [([2048] * 3, [True]), ([7] * 40, [False]), ([2055] * 5, [True, False])])
def test_one_launch_for_whole_blocks_and_one_for_tails_however_many_tensors(sizes, whole, monkeypatch):
    launches = Launches(monkeypatch)
    compare(update, problem(sizes, FP32, DEVICE), steps=1, **LANGUAGE)
    assert [arguments["WHOLE"] for _, arguments in launches.made] == whole


def test_only_a_step_on_other_addresses_copies_a_table_to_the_device(monkeypatch):
    """What a captured graph needs, and what makes a step cheap. Gradients may be other tensors at the same address."""
    tables = []
    make = triton_lion.launch_table
    monkeypatch.setattr(triton_lion, "launch_table", lambda tensors: tables.append(1) or make(tensors))
    monkeypatch.setattr(kernels, "choose", lambda *args, **kwargs: update)
    params, grads, _ = problem([2000, 3], FP32, DEVICE)
    lion = ShardedLion(params, lr=torch.tensor(1e-3, device=DEVICE))
    views, moved = [grad.view(-1) for grad in grads], [grad.clone() for grad in grads]
    counts = []
    for current in (grads, grads, views, moved, moved, [grad[:] for grad in moved]):
        for param, grad in zip(params, current, strict=True):
            param.grad = grad
        with TensorsFromHost() as made:
            lion.step()
        counts.append((len(tables), made.count > 0))
        tables.clear()
    copied, not_copied = (1, True), (0, False)
    assert counts == [copied, not_copied, not_copied, copied, not_copied, not_copied]


class TensorsFromHost(TorchDispatchMode):
    """Counts the tensors that are made of Python numbers or buffers on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.repeat_interleave.Tensor)
        return func(*args, **(kwargs or {}))


def test_new_addresses_inside_a_capture_are_refused_and_tables_of_a_capture_are_kept(monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda *args, **kwargs: update)
    (param,), (grad,), _ = problem([100], FP32, DEVICE)
    lion = ShardedLion([param], lr=1e-3)
    lion.init_state()
    param.grad = grad
    before = param.clone()
    with monkeypatch.context() as capturing:
        capturing.setattr(StepTensors, "are_captured", lambda tensors: True)
        with pytest.raises(LionError, match="Make one step with the same parameters, gradients and state before"):
            lion.step()
    assert_same_bits([param], [before])
    lion.step()
    with monkeypatch.context() as capturing:
        capturing.setattr(StepTensors, "are_captured", lambda tensors: True)
        lion.step()
    (table,) = lion._captured
    param.grad = grad.clone()
    lion.step()
    assert lion._captured == [table]
    assert lion._plans[id(lion.param_groups[0])].calls[0].tensors.launch is not table


def test_the_tensors_device_is_the_current_one_while_tables_are_made_and_kernels_launched(monkeypatch):
    """Triton launches on the current device, which may be another one than the tensors'."""
    entered, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    make, launch = triton_lion.launch_table, triton_lion._launch
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton_lion, "launch_table", lambda *args: seen.append(list(entered)) or make(*args))
    monkeypatch.setattr(triton_lion, "_launch", lambda *args: seen.append(list(entered)) or launch(*args))
    params, grads, exp_avgs = problem([100], FP32, DEVICE)
    run(update, params, grads, exp_avgs, **LANGUAGE)
    assert len(seen) == 2
    assert all(len(tensors) == 1 and tensors[0] is params[0] for tensors in seen)
    assert not entered


@pytest.mark.parametrize("name", ["lr", "weight_decay", "grad_scale", "skip"])
def test_a_scalar_on_another_device_is_refused(name):
    lists = problem([100], FP32, DEVICE)
    with pytest.raises(ValueError, match=r"scalars .* must be there or on the CPU, got meta"):
        run(update, *lists, **{**LANGUAGE, name: torch.zeros(1, dtype=torch.int32, device="meta")})


def test_autograd_refuses_values_that_the_kernel_has_overwritten():
    (param,), (grad,), (exp_avg,) = problem([100], FP32, DEVICE)
    param.requires_grad_()
    loss = (param * param).sum()
    run(update, [param.detach()], [grad], [exp_avg], **LANGUAGE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_packed_state_has_the_bits_of_the_reference(mix):
    lists = with_special_values(problem([1, 0, 4128, 2300, 31, 32, 33], FP32, DEVICE))
    compare_packed(update, packed(lists, *mix, copies=True), grad_scale=0.37)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("mix", "telemetry"),
    [*itertools.product([(FP32, FP32, FP32), (BF16, BF16, BF16), *MIXES], [False]), (MIXES[2], True)],
    ids=str,
)
def test_no_program_loads_an_address_that_it_has_stored_to(mix, telemetry, monkeypatch):
    """On a GPU another thread may do the load, and nothing makes it wait for the store."""
    call = packed(problem([1, 0, 1056], FP32), *mix, copies=True)
    programs = Programs(monkeypatch)
    run(update, **call, **LANGUAGE, telemetry=Telemetry() if telemetry else None)
    assert len(programs.stored) == 3, "a whole block, its tensor's tail, and the small tensor"
    written = set().union(*programs.stored.values())
    assert len(written & programs.loaded) >= 2 * 1057, "parameters and momenta are loaded and stored"
    assert not programs.loaded_after_a_store


class Programs:
    """Records the addresses that each program of the interpreted kernel loads and stores."""

    def __init__(self, monkeypatch):
        self.loaded, self.stored, self.loaded_after_a_store = set(), collections.defaultdict(set), set()
        launches = Launches(monkeypatch)
        builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def recorded_load(builder, pointers, mask, *rest):
            addresses = self._addresses(pointers, mask)
            self.loaded |= addresses
            self.loaded_after_a_store |= addresses & self.stored[launches.number, builder.grid_idx]
            return load(builder, pointers, mask, *rest)

        def recorded_store(builder, pointers, value, mask, *rest):
            self.stored[launches.number, builder.grid_idx] |= self._addresses(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", recorded_load)
        monkeypatch.setattr(builder, "create_masked_store", recorded_store)

    @staticmethod
    def _addresses(pointers, mask):
        return set(pointers.data[mask.data].tolist())


@pytest.mark.parametrize("row", [1, 33, 96, 1000])
def test_pieces_that_begin_and_end_anywhere_have_the_bits_of_the_reference(row):
    blocks = [BlockLayout(start, row) for start in (0, row - row % 32, 7, 3 * row + 40, 64)]
    lists = problem([900, 300, 200, 0, 1100], FP32, DEVICE)
    compare_packed(update, packed(lists, "remainder", BF16, torch.int8, blocks))


def test_momentum_of_every_magnitude_is_quantized_as_the_reference_does():
    grads = torch.randn(277, 32, generator=torch.Generator().manual_seed(3)) * 2.0 ** torch.arange(-149, 128)[:, None]
    lists = [[tensor.to(DEVICE)] for tensor in (torch.zeros_like(grads), grads, torch.zeros_like(grads))]
    compare_packed(update, packed(lists, FP32, FP32, torch.int8), steps=1, beta2=0.0)


def test_dtypes_that_the_kernel_does_not_support_are_refused():
    with pytest.raises(ValueError, match="does not support"):
        run(update, *([torch.ones(3, dtype=torch.float64, device=DEVICE)] for _ in range(3)), **LANGUAGE)


def test_parameters_with_tensors_that_are_not_contiguous_go_to_the_reference(monkeypatch):
    launches = Launches(monkeypatch)
    lists = [[flat[:12].view(3, 4).t(), flat[12:]] for (flat,) in problem([43], FP32, DEVICE)]
    compare(update, lists, steps=1, **LANGUAGE)
    assert launches.number == 1


def test_empty_lists_are_accepted():
    run(update, [], [], [], **LANGUAGE)
