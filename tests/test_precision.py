"""A bf16 parameter and its remainder rebuild every fp32 exactly, and the bf16 rounds half away from zero."""

import pytest
import torch

from megatron_lion.precision import join_master, split_master

BF16 = torch.bfloat16
# Low halves around both ends and the tie.
HALVES = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF])


def every_class() -> torch.Tensor:
    """All sign, exponent and upper fraction bits with each of HALVES: 655,360 patterns, NaN among them."""
    patterns = (torch.arange(1 << 16)[:, None] * (1 << 16) + HALVES).flatten()
    return patterns.to(torch.int32).view(torch.float32)


def test_every_number_is_rebuilt_exactly() -> None:
    masters = every_class()
    rebuilt = join_master(*split_master(masters))
    number = ~masters.isnan()
    assert torch.equal(rebuilt.view(torch.int32)[number], masters.view(torch.int32)[number])
    assert rebuilt[~number].isnan().all()


def test_the_parameter_of_a_nan_is_a_nan() -> None:
    masters = every_class()
    param, _ = split_master(masters)
    assert torch.equal(param.isnan(), masters.isnan())


def test_a_parameter_rounds_to_nearest_and_half_away_from_zero() -> None:
    """Against distances in fp64 between the number and the two bf16 around it."""
    masters = every_class()
    masters = masters[masters.isfinite() & (masters.abs() < torch.finfo(BF16).max)]
    bits = masters.view(torch.int32)
    toward = (bits & -0x10000).view(torch.float32).double()
    away = ((bits & -0x10000) + 0x10000).view(torch.float32).double()
    exact = masters.double()
    to_toward, to_away = (exact - toward).abs(), (away - exact).abs()
    expected = torch.where(to_away <= to_toward, away, toward)
    param, _ = split_master(masters)
    assert torch.equal(param.double(), expected)
    ties = to_away == to_toward
    assert ties.any()
    differs = param != masters.to(BF16)
    assert differs.any()
    assert not (differs & ~ties).any(), "it differs from torch's cast only at ties"


def test_no_two_masters_share_both_halves() -> None:
    masters = every_class()
    masters = masters[~masters.isnan()]
    param, remainder = split_master(masters)
    pairs = param.view(torch.int16).long() * (1 << 16) + remainder.long()
    assert len(pairs.unique()) == len(masters.view(torch.int32).unique())


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        split_master(torch.ones(3, dtype=BF16))
