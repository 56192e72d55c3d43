"""Every faster kernel is bit-identical to the reference."""

import pytest
import torch

from megatron_lion.kernels import foreach
from megatron_lion.kernels.chunks import chunks_of
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.step import StepTensors
from megatron_lion.update import lion_update_
from tests.kernel_calls import reference, run

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LANGUAGE = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
DYADIC = {"lr": 2**-4, "beta1": 0.5, "beta2": 0.75, "weight_decay": 0.5}
EXTREMES = [0.0, 1.0, 1e-3, 1e30, float("inf")]

KERNELS = {
    "foreach-fp64": (lion_update_foreach_, FP64),
    "foreach-fp32": (lion_update_foreach_, FP32),
    "fused-fp32": (lion_update_fused_, FP32),
}


def cells(devices):
    """Each kernel on each device; the CPU kernel only on the CPU."""
    return [
        pytest.param(device, *kernel, id=f"{device}-{name}")
        for device in devices
        for name, kernel in KERNELS.items()
        if device == "cpu" or kernel[0] is not lion_update_fused_
    ]


EVERY_KERNEL = pytest.mark.parametrize(("device", "kernel", "dtype"), cells(DEVICES))
EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)


def test_the_cpu_kernel_is_tested_only_on_the_cpu():
    on_gpu = [cell.id for cell in cells(["cpu", "cuda"]) if cell.values[0] == "cuda"]
    assert on_gpu == ["cuda-foreach-fp64", "cuda-foreach-fp32"]


def problem(numels, dtype, device="cpu", seed=0):
    """Parameters, gradients and momenta on a grid of sixteenths with many zeros: c == 0 often, exactly or nearly."""
    generator = torch.Generator().manual_seed(seed)

    def grid(numel):
        return (torch.randint(-32, 33, (numel,), generator=generator) / 16).to(device, dtype)

    return tuple([grid(numel) for numel in numels] for _ in range(3))


def with_special_values(lists):
    """The same lists with every combination of zeros, denormals, infinities and NaN put at the ends of the tensors."""
    dtype = lists[0][0].dtype
    tiny = torch.finfo(dtype).tiny
    values = [tiny, -tiny / 8, *EXTREMES, *(-x for x in EXTREMES), float("nan")]
    special = torch.tensor(values, dtype=dtype)
    tail = torch.cartesian_prod(special, special, special)
    for position, tensors in enumerate(lists):
        for tensor in tensors:
            if tensor.numel() >= len(tail):
                tensor[-len(tail) :] = tail[:, position].to(tensor)
    return lists


def assert_same_bits(actual, expected):
    """NaN where the other is NaN, elsewhere the same bits, so that -0.0 is not 0.0."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


def compare(kernel, lists, steps=3, **hyper):
    """Run ``kernel`` and the reference ``steps`` times from the same start and compare every bit of all three lists."""
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    for _ in range(steps):
        run(kernel, *lists, **hyper)
        reference(*expected, **hyper)
        for actual, right in zip(lists, expected, strict=True):
            assert_same_bits(actual, right)


@pytest.mark.parametrize("hyper", [LANGUAGE, DYADIC, {**LANGUAGE, "beta1": 0.95, "beta2": 0.98}])
@EVERY_KERNEL
def test_uneven_and_empty_tensors_have_the_bits_of_the_reference(device, kernel, dtype, hyper):
    compare(kernel, problem([1, 0, 17, 1023, 1, 4099, 0], dtype, device), **hyper)


@EVERY_KERNEL
def test_a_million_elements_have_the_bits_of_the_reference(device, kernel, dtype):
    compare(kernel, problem([1_000_003, 5], dtype, device), steps=1, **LANGUAGE)


@EVERY_KERNEL
def test_gradients_that_nearly_cancel_the_momentum_have_the_bits_of_the_reference(device, kernel, dtype):
    """Here the rounding of c decides its sign: alpha=, lerp or a fused multiply-add would show."""
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(10_001, generator=generator, dtype=FP64)
    wiggle = 1 + torch.randint(-3, 4, m.shape, generator=generator) * torch.finfo(dtype).eps
    lists = [[tensor.to(device, dtype)] for tensor in (torch.randn_like(m), -9 * m * wiggle, m)]
    compare(kernel, lists, steps=1, **LANGUAGE)


@pytest.mark.parametrize("hyper", [LANGUAGE, DYADIC, {**LANGUAGE, "weight_decay": 0.0}])
@EVERY_KERNEL
def test_zeros_denormals_infinities_and_nan_have_the_bits_of_the_reference(device, kernel, dtype, hyper):
    lists = with_special_values(problem([4099, 3, 5003], dtype, device))
    assert all(tensors[0].isnan().any() and tensors[0].isinf().any() for tensors in lists)
    compare(kernel, lists, **hyper)


@EVERY_KERNEL
def test_exact_ties_only_decay(device, kernel, dtype):
    """Seen against the rule itself, not the reference: with g = -m and beta1 = 1/2 the direction is zero."""
    params, _, exp_avgs = problem([1, 33, 0, 1000], dtype, device)
    expected = [param - (0.5 * param) * 2**-4 for param in params]
    run(kernel, params, [-m for m in exp_avgs], exp_avgs, **DYADIC)
    assert_same_bits(params, expected)


@EVERY_KERNEL
def test_unaligned_slices_of_a_buffer_have_the_bits_of_the_reference(device, kernel, dtype):
    """Shards of a flat buffer start anywhere; the elements between them must not be touched."""
    flats = [tensors[0] for tensors in with_special_values(problem([20_011], dtype, device))]
    before = [flat.clone() for flat in flats]
    cuts = [(1, 4), (4, 4), (5, 1030), (1031, 9004), (9007, 20_010)]
    compare(kernel, [[flat[start:stop] for start, stop in cuts] for flat in flats], **LANGUAGE)
    for flat, old in zip(flats, before, strict=True):
        for gap in (0, 4, 1030, 9004, 9005, 9006, 20_010):
            assert_same_bits([flat[gap]], [old[gap]])


@EVERY_KERNEL
def test_matrices_scalars_and_transposes_have_the_bits_of_the_reference(device, kernel, dtype):
    lists = [
        [flat[0:1].view(()), flat[1:13].view(3, 4).t(), flat[13:].view(2, 3, 5)]
        for (flat,) in problem([43], dtype, device)
    ]
    compare(kernel, lists, **LANGUAGE)


@pytest.fixture
def foreach_limit(monkeypatch, device):
    """Sets how many elements a call of a foreach operation may have."""
    name = "MAX_NUMEL_CPU" if device == "cpu" else "MAX_NUMEL"
    return lambda limit: monkeypatch.setattr(foreach, name, limit)


@EVERY_DEVICE
@pytest.mark.parametrize("limit", [1, 10, 1000])
def test_lists_longer_than_one_chunk_update_every_tensor_once(device, limit, foreach_limit):
    foreach_limit(limit)
    lists = problem([3, 0, 7, 1, 25, 0, 0, 10, 9, 2, 40], FP32, device)
    for tensors in lists:
        tensors.append(tensors.pop().view(5, 8).t())
    compare(lion_update_foreach_, lists, **LANGUAGE)
    compare(lion_update_foreach_, problem([], FP32, device), **LANGUAGE)


@EVERY_DEVICE
def test_chunks_keep_to_the_limit_unless_a_tensor_that_cannot_be_cut_exceeds_it(device):
    lists = [
        [*tensors, torch.ones(3, 4, device=device).t()] for tensors in problem([3, 7, 0, 1, 25, 9, 1, 1], FP32, device)
    ]
    sizes = [[master.numel() for master in chunk.masters] for chunk in chunks_of(StepTensors(*lists), 10)]
    assert sizes == [[3, 7], [1], [10], [10], [5], [9, 1], [1], [12]]


@EVERY_KERNEL
def test_gradients_keep_their_bits(device, kernel, dtype):
    """Guards against a kernel that uses the gradients as its scratch space."""
    params, grads, exp_avgs = with_special_values(problem([4099], dtype, device))
    before, version = grads[0].clone(), grads[0]._version
    run(kernel, params, grads, exp_avgs, **LANGUAGE)
    assert_same_bits(grads, [before])
    assert grads[0]._version == version


@EVERY_KERNEL
@pytest.mark.parametrize("scale", [0.37, 2.0**-10, 3.0])
def test_a_folded_gradient_scale_equals_a_scaled_gradient(device, kernel, dtype, scale):
    """The clip factor, folded in instead of a pass before the step: the product is rounded just as that pass would."""
    lists = with_special_values(problem([4099, 0, 31], dtype, device))
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    run(kernel, *lists, grad_scale=scale, **LANGUAGE)
    reference(expected[0], [grad * scale for grad in expected[1]], expected[2], **LANGUAGE)
    assert_same_bits(lists[0], expected[0])
    assert_same_bits(lists[2], expected[2])


@EVERY_KERNEL
def test_the_copy_is_the_new_parameter_rounded_to_bf16(device, kernel, dtype):
    params, grads, exp_avgs = with_special_values(problem([4099, 0, 31], dtype, device))
    copies = [torch.ones(param.shape, dtype=BF16, device=device) for param in params]
    run(kernel, params, grads, exp_avgs, model_copies=copies, **LANGUAGE)
    assert_same_bits(copies, [param.to(BF16) for param in params])


def test_empty_lists_are_accepted():
    for kernel in (lion_update_foreach_, lion_update_fused_, lion_update_):
        run(kernel, [], [], [], **LANGUAGE)
