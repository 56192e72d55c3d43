"""Has the estimate of the gradient converged, or is it still the noise that is measured?

A mean of B batch gradients is gbar = grad f + noise, E||noise||^2 = sigma^2 / B. While the noise outweighs grad f,
gbar's elements are, by the central limit theorem, nearly N(0, sigma_i^2 / B), and for such

    E|x| / sqrt(E x^2) = sqrt(2 / pi) = 0.798     of each element x, so     r / sqrt(d) -> sqrt(2 / pi)

for elements of one scale (times mean(sigma_i) / rms(sigma_i) <= 1 otherwise): r = Theta(sqrt(d)) whatever grad f is.
So a ratio near 0.798 sqrt(d) says something about grad f only together with a signal-to-noise well above 1.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_lion.config import LionError

PREFIXES = (10, 25, 50)
GAUSSIAN_RATIO = math.sqrt(2.0 / math.pi)

# has_converged says what these mean: each leaves at most about 5 % of the ratio to noise.
MIN_SNR = 10.0
MAX_CHANGE = 0.02


@dataclass(frozen=True, kw_only=True)
class NoiseEstimate:
    """Noise and signal of a mean of B iid batch gradients; :func:`noise_estimate` has the formulas."""

    sigma2: float
    """sigma^2 of Assumption 3 for one batch, E||g_b - grad f||^2"""
    gradient_squared: float
    """||grad f||^2, unbiased, so negative at times where the noise outweighs it"""

    noise_scale: float
    """tr(Sigma) / ||grad f||^2 in batches; inf where the noise hides ||grad f||"""
    snr: float
    """||grad f||^2 / (sigma^2 / B) of the mean gradient: about 0 without a signal, inf without noise"""


def noise_estimate(batches: int, sum_squared: float, mean_squared: float) -> NoiseEstimate | None:
    """Estimate noise and signal from norms alone, without a second pass over the batches.

    With B iid batch gradients g_b and their mean gbar::

        sigma^2        = (sum_b ||g_b||^2 - B ||gbar||^2) / (B - 1)       unbiased
        ||grad f||^2   = ||gbar||^2 - sigma^2 / B                         unbiased
        noise scale    = sigma^2 / ||grad f||^2                           a ratio of unbiased estimates
        snr            = ||grad f||^2 / (sigma^2 / B)                     likewise

    The first two are the textbook sample variance, summed over elements: sigma^2 = tr(Sigma), Sigma the covariance of
    one batch's gradient. The noise scale is B_simple of McCandlish et al. (2018), arXiv 1812.06162, in units of one
    batch: times the batch's samples (tokens) it is theirs. The two ratios are consistent, and biased by about their
    squared relative standard errors: with independent noise of one scale in d elements, E[snr] exceeds snr by
    2 (1 + snr) / (d (B - 1)), next to nothing for a network; the noise scale's bias is large where snr is near 0.

    Rounding: the difference keeps sigma^2 only above about 1e-6 B ||gbar||^2 / (B - 1) where gbar is float32; below it
    sigma^2 may come out 0 and snr inf, and neither changes what :func:`has_converged` says.

    Batches of unequal weight: pass sum_b (w_b / mean w) ||g_b||^2 and the weighted mean. Where a batch's covariance
    goes as 1 / w_b, as with w_b samples in it, the formulas hold unchanged, sigma^2 that of a batch of mean weight.

    If the batches are the whole training set, each sample once, gbar is the training loss's exact gradient; the numbers
    then say how near it is to that of the distribution the set was drawn from.

    Args:
        batches: B.
        sum_squared: sum_b ||g_b||^2, a running sum over the batches.
        mean_squared: ||gbar||^2.

    Returns:
        None for B < 2, where no variance can be estimated. NaN in gives NaN out.
    """
    if batches < 2:
        return None
    excess = sum_squared - batches * mean_squared
    sigma2 = 0.0 if excess < 0.0 else excess / (batches - 1)
    gradient_squared = mean_squared - sigma2 / batches
    return NoiseEstimate(
        sigma2=sigma2,
        gradient_squared=gradient_squared,
        noise_scale=_noise_scale(sigma2, gradient_squared),
        snr=_divide(gradient_squared, sigma2 / batches),
    )


def has_converged(batches: int, ratio: float, prefixes: Mapping[int, float], snr: float | None) -> bool | None:
    """Whether the ratio is that of grad f rather than that of the noise: both conditions, as each misses a case.

    1. snr >= MIN_SNR = 10. Noise adds sigma^2 / B to ||gbar||^2, so ||gbar||_2 is at most sqrt(1 + 1/10), 5 %, too
       large. Alone it misses a sparse grad f: noise may add up to sqrt(d / snr) times ||grad f||_2 to the l1 norm.
    2. The ratio of the latest prefix of at most half the batches differs from the final one by at most MAX_CHANGE = 2 %
       of it. What noise adds to l1 falls as 1/sqrt(B) or faster, so an excess x at B was at least sqrt(2) x at B/2: a
       change of 2 % leaves x = 5 % at most. Alone it misses pure noise, whose ratio stands still at sqrt(2 d / pi).

    The prefix of 50 decides a round of 100 batches. For longer rounds give a prefix near half of them: an earlier one
    makes the rule stricter, never laxer, as long as noise only adds to the ratio.

    Args:
        batches: B.
        ratio: r of all B batches.
        prefixes: r of the first 10, 25, 50 batches, by their number.
        snr: of the mean gradient; None where there is none.

    Returns:
        None where it cannot be said: a single batch, or no prefix of at most half the batches. False for NaN.
    """
    usable = [count for count in prefixes if 2 * count <= batches]
    if snr is None or not usable:
        return None
    change = abs(prefixes[max(usable)] - ratio)
    return bool(snr >= MIN_SNR and change <= MAX_CHANGE * ratio)


def round_prefixes(batches: int) -> tuple[int, ...]:
    """The prefixes to record in a round of ``batches``: 10, 25 and 50 as far as it has more, and half of it."""
    return tuple(sorted({count for count in PREFIXES if count < batches} | {max(batches // 2, 1)}))


def check_prefixes(prefixes: Iterable[int]) -> tuple[int, ...]:
    """Return ``prefixes`` sorted, each once, or raise LionError for one that is not a positive whole number."""
    prefixes = tuple(prefixes)
    for count in prefixes:
        if not isinstance(count, int) or count < 1:
            raise LionError(f"prefixes are numbers of batches, whole and >= 1 as in {PREFIXES}, got {count!r}")
    return tuple(sorted(set(prefixes)))


def _noise_scale(sigma2: float, gradient_squared: float) -> float:
    """sigma^2 / ||grad f||^2, inf for an estimate of ||grad f||^2 that is not positive."""
    if gradient_squared <= 0.0:
        return math.inf if sigma2 > 0.0 else math.nan
    return sigma2 / gradient_squared


def _divide(signal: float, noise: float) -> float:
    """signal / noise; inf without noise, NaN without both."""
    if noise == 0.0:
        return math.inf if signal > 0.0 else math.nan
    return signal / noise
