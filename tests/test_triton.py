"""The Triton kernel has the bits of the reference: in Triton's interpreter, and on a GPU where there is one."""

import itertools

import pytest
import torch
from test_kernels import DYADIC, LANGUAGE, assert_same_bits, compare, problem, with_special_values

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
    update(params, grads, exp_avgs, copies=copies, **LANGUAGE)
    assert_same_bits(copies, [param.to(BF16) for param in params])


def test_hyperparameters_on_the_device_give_the_bits_of_numbers():
    lists = problem([2000, 3], FP32, DEVICE)
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    numbers = {"lr": 1e-3, "weight_decay": 0.1, "grad_scale": 0.37}
    on_device = {name: torch.tensor(value, device=DEVICE) for name, value in numbers.items()}
    update(*lists, beta1=0.9, beta2=0.95, **on_device)
    update(*expected, beta1=0.9, beta2=0.95, **numbers)
    for actual, right in zip(lists, expected, strict=True):
        assert_same_bits(actual, right)


@pytest.mark.parametrize("skip", [0, 1])
def test_the_skip_flag_leaves_everything_as_it_was(skip):
    lists = problem([2000, 3], FP32, DEVICE)
    before = [[tensor.clone() for tensor in tensors] for tensors in lists]
    update(*lists, skip=torch.tensor([skip], dtype=torch.int32, device=DEVICE), **LANGUAGE)
    unchanged = all(torch.equal(a, b) for i in (0, 2) for a, b in zip(lists[i], before[i], strict=True))
    assert unchanged == bool(skip)


@pytest.mark.parametrize("tensors", [1, 5, 40])
def test_one_launch_however_many_tensors(tensors, monkeypatch):
    launches = []
    kernel = triton_lion._lion_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_lion, "_lion_kernel", Counted())
    compare(update, problem([7] * tensors, FP32, DEVICE), steps=1, **LANGUAGE)
    assert len(launches) == 1


def test_nothing_to_update_is_no_error_and_sizes_must_agree():
    update([], [], [], **LANGUAGE)
    with pytest.raises(ValueError, match="of one size"):
        update([torch.ones(3)], [torch.ones(2)], [torch.ones(3)], **LANGUAGE)
