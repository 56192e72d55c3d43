"""Momentum in 8 bits: the error bound, exact second quantization, and pieces that equal the whole."""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_lion.precision import BLOCK, LEVELS, SMALLEST_SCALE, BlockLayout, dequantize, quantize

ROWS = (1, 5, 31, 32, 33, 50, 64, 96, 100, 128)


def momenta(row: int) -> torch.Tensor:
    """Seven rows over eleven orders of magnitude, with a row of zeros and, where there is room, a tiny number."""
    torch.manual_seed(row)
    values = torch.randn(7, row) * torch.logspace(-8, 3, 7)[:, None]
    values[2] = 0.0
    values[3, row // 2] = 1e-35
    return values


def largest_of_block(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each element's block, found block by block."""
    largest = torch.empty_like(values)
    for row, start in itertools.product(range(values.shape[0]), range(0, values.shape[1], BLOCK)):
        largest[row, start : start + BLOCK] = values[row, start : start + BLOCK].abs().max()
    return largest


@pytest.mark.parametrize("row", ROWS)
def test_the_error_is_within_the_stated_bound(row: int) -> None:
    values = momenta(row)
    layout = BlockLayout.of_whole(values)
    codes, scales = quantize(values, layout)
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert scales.dtype == torch.bfloat16
    assert len(scales) == layout.count(values.numel()) == 7 * math.ceil(row / BLOCK)
    error = (dequantize(codes, scales, layout).double() - values.double()).abs()
    largest = largest_of_block(values.double())
    # 2^-8: the scale's own rounding, which moves every level, and which the clamp at the top absorbs.
    bound = (codes.double().abs() + 0.25) * largest / LEVELS + values.double().abs() * 2.0**-8
    bound = torch.where(largest < SMALLEST_SCALE, largest, bound)  # such a block is stored as zeros
    assert (error <= bound).all()
    small = values.double().abs() < largest / (4 * LEVELS) * 0.99
    assert (codes[small] == 0).all()
    kept = (values.double().abs() > largest / (4 * LEVELS) * 1.01) & (largest > 1e-30)
    assert torch.equal(codes[kept].sign().float(), values[kept].sign()), "an element keeps its sign"


@pytest.mark.parametrize("row", ROWS)
def test_quantizing_again_changes_nothing(row: int) -> None:
    values = momenta(row)
    layout = BlockLayout.of_whole(values)
    codes, scales = quantize(values, layout)
    again, scales_again = quantize(dequantize(codes, scales, layout), layout)
    assert torch.equal(again, codes)
    assert torch.equal(scales_again, scales)


def test_every_code_and_many_scales_survive_a_second_quantization() -> None:
    """Each of the 255 codes in a block with a 127, at every bf16 scale that is stored."""
    bits = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    stored = bits[bits.float() >= 2.0**-100]
    codes = torch.arange(-127, 128)
    for start in range(0, len(codes), BLOCK - 1):
        part = codes[start : start + BLOCK - 1]
        block = torch.cat([torch.tensor([127]), part, torch.zeros(BLOCK - 1 - len(part), dtype=torch.long)])
        whole = block.to(torch.int8).repeat(len(stored), 1)
        layout = BlockLayout(0, BLOCK)
        again, scales = quantize(dequantize(whole, stored, layout), layout)
        assert torch.equal(again, whole)
        assert torch.equal(scales, stored)


@pytest.mark.parametrize("row", ROWS)
def test_a_piece_that_splits_no_block_equals_the_whole(row: int) -> None:
    values = momenta(row)
    whole, scales = quantize(values, BlockLayout.of_whole(values))
    rebuilt = dequantize(whole, scales, BlockLayout.of_whole(values))
    cuts = [element for element in range(values.numel() + 1) if element % row % BLOCK == 0]
    for start, stop in itertools.combinations(cuts, 2):
        layout = BlockLayout(start, row)
        assert not layout.splits_a_block(stop - start)
        codes, piece_scales = quantize(values.flatten()[start:stop], layout)
        assert torch.equal(codes, whole.flatten()[start:stop])
        assert torch.equal(dequantize(codes, piece_scales, layout), rebuilt.flatten()[start:stop])


@pytest.mark.parametrize(("start", "numel", "cuts"), [(0, 64, False), (8, 56, True), (0, 63, True), (32, 0, False)])
def test_a_piece_knows_whether_it_splits_a_block(start: int, numel: int, cuts: bool) -> None:
    assert BlockLayout(start, 64).splits_a_block(numel) == cuts


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_number_that_is_not_finite_becomes_nan_and_no_other(bad: float) -> None:
    values = torch.ones(96)
    values[40] = bad
    rebuilt = dequantize(*quantize(values, BlockLayout(0, 96)), BlockLayout(0, 96))
    assert rebuilt[32:64].isnan().all()
    assert torch.equal(rebuilt[:32], values[:32])
    assert torch.equal(rebuilt[64:], values[64:])


def test_the_square_root_is_rounded_to_nearest() -> None:
    """torch's own fp32 square root is off by one in a fifth of the numbers, and with it one code in a million."""
    torch.manual_seed(9)
    values = torch.rand(1 << 21)
    values[::BLOCK] = 1.0
    codes, _ = quantize(values, BlockLayout(0, BLOCK))
    expected = np.rint(np.sqrt(values.numpy() * np.float32(LEVELS)))
    assert np.array_equal(codes.numpy(), expected)


def test_empty_and_scalar_tensors() -> None:
    codes, scales = quantize(torch.zeros(0), BlockLayout(64, 32))
    assert codes.numel() == scales.numel() == 0
    number = torch.tensor(2.0)
    assert torch.equal(
        dequantize(*quantize(number, BlockLayout.of_whole(number)), BlockLayout.of_whole(number)), number
    )
