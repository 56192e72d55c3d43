"""The estimators against a least-squares problem whose gradient and noise are known, and the rule that uses them."""

import math

import pytest
import torch

from megatron_lion.config import LionError
from megatron_lion.stats import GradientSums, MeanGradient, has_converged, noise_estimate
from megatron_lion.stats.convergence import GAUSSIAN_RATIO, check_prefixes

# f(theta) = E (x . theta - y)^2 / 2 with x ~ N(0, I_d), y = x . target + N(0, s^2), e = theta - target:
# grad f = e; for one sample E||(x . e - n) x - e||^2 = (d + 1) ||e||^2 + d s^2 (Isserlis); for b samples, 1/b of it.
D, SAMPLES, S = 20, 8, 0.7
ERROR = torch.linspace(-1.0, 1.5, D, dtype=torch.float64)
GRADIENT_SQUARED = float(ERROR @ ERROR)
SIGMA2 = ((D + 1) * GRADIENT_SQUARED + D * S**2) / SAMPLES


def batch_gradients(batches: int, generator: torch.Generator) -> torch.Tensor:
    """Shape (batches, D): the gradients of as many independent batches of SAMPLES samples."""
    x = torch.randn(batches, SAMPLES, D, generator=generator, dtype=torch.float64)
    noise = S * torch.randn(batches, SAMPLES, generator=generator, dtype=torch.float64)
    return ((x @ ERROR - noise).unsqueeze(-1) * x).mean(dim=1)


def test_the_estimates_are_unbiased_on_a_problem_with_a_known_answer() -> None:
    """800 repeats of 10 batches with a fixed seed: the means lie within 4 of their own standard errors (2 % here)."""
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(800):
        g = batch_gradients(10, generator)
        estimate = noise_estimate(10, float(g.square().sum()), float(g.mean(0).square().sum()))
        assert estimate is not None
        estimates.append((estimate.sigma2, estimate.gradient_squared))
    values = torch.tensor(estimates, dtype=torch.float64)
    errors = values.std(dim=0) / math.sqrt(len(values))
    for mean, error, truth in zip(values.mean(dim=0), errors, (SIGMA2, GRADIENT_SQUARED), strict=True):
        assert error < 0.03 * truth  # or the test would say nothing
        assert abs(mean - truth) < 4 * error


def test_noise_scale_and_snr_reach_their_true_values() -> None:
    batches = 20_000
    g = batch_gradients(batches, torch.Generator().manual_seed(1))
    estimate = noise_estimate(batches, float(g.square().sum()), float(g.mean(0).square().sum()))
    assert estimate is not None
    assert estimate.noise_scale == pytest.approx(SIGMA2 / GRADIENT_SQUARED, rel=0.05)
    assert estimate.snr == pytest.approx(batches * GRADIENT_SQUARED / SIGMA2, rel=0.05)


def test_pure_noise_has_no_signal_and_the_gaussian_ratio() -> None:
    g = torch.randn(100, 5000, generator=torch.Generator().manual_seed(0))
    estimate = noise_estimate(100, float(g.double().square().sum()), float(g.double().mean(0).square().sum()))
    assert estimate is not None
    assert abs(estimate.snr) < 5 * math.sqrt(2 / 5000)
    sums = GradientSums.from_tensors(g.mean(0), g[0])
    assert sums.ratio_over_sqrt_d == pytest.approx(GAUSSIAN_RATIO, abs=0.02)
    assert has_converged(100, sums.ratio, {50: sums.ratio}, estimate.snr) is False


def test_batches_of_unequal_size_give_the_same_estimates_when_weighted_by_their_samples() -> None:
    """2,000 repeats of batches with 2 and 8 samples, weights 2 and 8: sigma^2 is that of their mean size, 5 samples."""
    generator = torch.Generator().manual_seed(0)
    sigma2 = []
    for _ in range(2000):
        samples = torch.randn(10, D, generator=generator, dtype=torch.float64)
        mean = MeanGradient([ERROR])
        mean.add([samples[:2].mean(0)], weight=2)
        mean.add([samples[2:].mean(0)], weight=8)
        estimate = noise_estimate(2, mean.sum_squared, float(mean.means[0].square().sum()))
        assert estimate is not None
        sigma2.append(estimate.sigma2)
    values = torch.tensor(sigma2)
    assert abs(values.mean() - D / 5) < 4 * values.std() / math.sqrt(len(values))


def test_one_batch_has_no_noise_estimate() -> None:
    assert noise_estimate(1, 2.0, 2.0) is None
    assert noise_estimate(0, 0.0, 0.0) is None


def test_the_limits_of_the_estimates_are_defined() -> None:
    equal = noise_estimate(4, 4.0, 1.0)
    rounded = noise_estimate(4, 4.0, 1.0 + 1e-15)
    for estimate in (equal, rounded):
        assert estimate is not None
        assert (estimate.sigma2, estimate.noise_scale, estimate.snr) == (0.0, 0.0, math.inf)
    hidden = noise_estimate(4, 4.0, 0.0)
    assert hidden is not None
    assert hidden.gradient_squared < 0.0
    assert (hidden.noise_scale, hidden.snr) == (math.inf, -1.0)
    zero, bad = noise_estimate(4, 0.0, 0.0), noise_estimate(4, math.nan, 1.0)
    assert zero is not None
    assert bad is not None
    assert math.isnan(zero.snr)
    assert math.isnan(bad.snr)
    assert math.isnan(bad.noise_scale)


@pytest.mark.parametrize(
    ("batches", "prefixes", "snr", "expected"),
    [
        (100, {10: 9.0, 25: 9.0, 50: 1.01}, 50.0, True),
        (100, {10: 1.0, 25: 1.0, 50: 1.03}, 50.0, False),  # still moving
        (100, {10: 1.0, 25: 1.0, 50: 1.0}, 9.0, False),  # still, but noise
        (60, {10: 9.0, 25: 1.0, 50: 9.0}, 50.0, True),  # 50 of 60 says too little
        (100, {50: 1.0}, math.nan, False),
        (100, {50: 1.0}, math.inf, True),
        (15, {10: 1.0}, 50.0, None),
        (1, {}, None, None),
    ],
)
def test_convergence_asks_for_a_signal_and_for_a_ratio_that_stands_still(
    batches: int, prefixes: dict[int, float], snr: float | None, expected: bool | None
) -> None:
    assert has_converged(batches, 1.0, prefixes, snr) is expected
    assert has_converged(batches, math.nan, prefixes, snr) in (False, None)


def test_a_sparse_gradient_in_noise_is_not_called_converged_for_its_signal() -> None:
    """One large element in noise: snr 14 after 100 batches, r three quarters too high: only the prefix shows it."""
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(10_000)
    true[0] = 38.0
    mean = MeanGradient([true])
    ratios = {}
    for count in range(1, 101):
        mean.add([true + torch.randn(10_000, generator=generator)])
        ratios[count] = GradientSums.from_tensors(mean.means[0], true).ratio
    estimate = noise_estimate(100, mean.sum_squared, float(mean.means[0].double().square().sum()))
    assert estimate is not None
    assert estimate.snr > 10.0
    assert ratios[100] > 15.0  # the truth is 1
    assert has_converged(100, ratios[100], {50: ratios[50]}, estimate.snr) is False


@pytest.mark.parametrize("bad", [0, -1, 2.5])
def test_prefixes_are_whole_numbers_of_batches(bad: int) -> None:
    assert check_prefixes([50, 10, 10]) == (10, 50)
    with pytest.raises(LionError, match=r"whole and >= 1 as in \(10, 25, 50\)"):
        check_prefixes([10, bad])
