"""The CPU kernel for the gradient norm: exact sums, the same bits for any number of threads, and refusals."""

import itertools
import math

import pytest
import torch

from megatron_lion.config import LionError, LionOptions
from megatron_lion.integration.optimizer import fast_norm
from megatron_lion.kernels.norm_cpu import sum_of_squares_cpu

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = [0, 1, 7, 8, 15, 16, 17, 31, 1000, 65_535, 65_536, 65_537, 200_003]


def gradients(sizes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (FP32, BF16)], ids=str)
def test_the_sum_is_that_of_fp64_for_odd_sizes_and_mixed_dtypes(dtypes):
    grads = [grad for dtype in dtypes for grad in gradients(SIZES, dtype)]
    expected = math.fsum(float(x) ** 2 for grad in grads for x in grad.double().tolist())
    assert sum_of_squares_cpu(grads) == pytest.approx(expected, rel=1e-7)


def test_the_error_of_equal_roundings_stays_below_the_bound():
    """Squares that are all rounded to the same side, the worst case for sums in fp32."""
    value = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    for scale in (1.0, 1.1, 1.3, 1.7):
        grads = torch.full((65_536,), float(value * scale))
        exact = 65_536 * float(grads[0].double()) ** 2
        assert sum_of_squares_cpu([grads]) == pytest.approx(exact, rel=1.2e-6)


def test_slices_that_begin_anywhere_are_summed_whole():
    (values,) = gradients([2000], FP32)
    for first, last in itertools.product(range(9), (511, 520, 1991, 2000)):
        expected = float((values[first:last].double() ** 2).sum())
        assert sum_of_squares_cpu([values[first:last]]) == pytest.approx(expected, rel=1e-7)


def test_the_bits_do_not_depend_on_the_number_of_threads_or_the_run():
    grads = gradients([1_000_003, 65_537, 5], FP32) + gradients([300_001], BF16)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            found.add(sum_of_squares_cpu(grads))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 8, 511, 512, 999])
def test_what_is_not_finite_remains_so(dtype, bad, position):
    (values,) = gradients([1000], dtype)
    values[position] = bad
    total = sum_of_squares_cpu([values])
    assert math.isnan(total) if math.isnan(bad) else total == math.inf


def test_no_gradients_have_the_sum_zero():
    assert sum_of_squares_cpu([]) == sum_of_squares_cpu([torch.empty(0)]) == 0.0


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("value", [3e38, 1e20, 1e-25, 1e-38, 1e-40])
def test_squares_too_large_or_small_for_fp32_are_summed(dtype, value):
    values = torch.full((2000,), value).to(dtype)
    assert sum_of_squares_cpu([values]) == pytest.approx(float((values.double() ** 2).sum()), rel=1e-12, abs=0)
    mixed = torch.cat([torch.ones(1024, dtype=dtype), values])
    assert sum_of_squares_cpu([mixed]) == pytest.approx(float((mixed.double() ** 2).sum()), rel=1e-7)


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, dtype=torch.float16), torch.ones(3, device="meta"), torch.ones(4, 4).t()[1:]], ids=str
)
def test_unsupported_tensors_are_refused_and_left_to_megatron(tensor):
    """An address on a device would crash the process."""
    with pytest.raises(ValueError, match="needs contiguous fp32 or bf16 tensors on the CPU"):
        sum_of_squares_cpu([torch.ones(3), tensor])
    assert fast_norm._l2_norm([torch.ones(3), tensor]) is None


def test_the_flag_is_refused_where_it_would_have_no_effect(monkeypatch):
    asked, on_gpu = LionOptions(fast_norm=True), torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(LionError, match="is for gradients on a CPU, and this run has some on meta"):
        fast_norm.check(asked, [on_gpu])
    fast_norm.check(LionOptions(), [on_gpu])
    monkeypatch.setattr(fast_norm, "norm_cpu_problem", lambda: "no C++ compiler on PATH")
    with pytest.raises(LionError, match=r"needs a C\+\+ compiler: no C\+\+ compiler on PATH\. Install one"):
        fast_norm.check(asked, [torch.nn.Linear(2, 2)])
