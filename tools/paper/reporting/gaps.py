"""Differences between optimizers, paired by seed, with intervals; and how much of one the learning rate explains.

Runs of one seed have the same initial weights and the same order of data, so their losses are not independent:
differences are taken within a seed, and the interval is over the seeds.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from tools.paper import theory


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % interval."""

    mean: float
    half_width: float | None
    """None for one seed"""
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({'one seed' if self.half_width is None else f'+- {self.half_width:.3f}'})"

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0; of one seed, whether its value is."""
        return self.mean - (self.half_width or 0.0) > 0.0

    @property
    def is_below_zero(self) -> bool:
        return self.mean + (self.half_width or 0.0) < 0.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of a gap that the learning rate explains: 1 - gap at the best rates / gap at the paper's."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        value, low, high = (f"{100 * each:.0f}" for each in (self.value, self.low, self.high))
        return f"{value} % [{low}, {high}]"


def interval(values: Sequence[float]) -> Interval:
    """The mean of one value a seed, with its interval.

    Example:
        >>> str(interval([2.0, 2.1, 1.9]))
        '2.000 (+- 0.248)'
    """
    half = theory.half_width(torch.tensor(values, dtype=torch.float64)).item() if len(values) > 1 else None
    return Interval(mean=statistics.fmean(values), half_width=half, seeds=len(values))


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """``first`` minus ``second`` of each seed that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def share_of_rate(at_papers: Mapping[int, float], at_best: Mapping[int, float]) -> Share | None:
    """The share from the gaps of each seed at the paper's rates and at the best ones.

    It is 1 - mean(b) / mean(p), with Fieller's interval for the ratio q of two paired means: all q for which the
    differences b - q p have a t interval (n - 1 degrees of freedom) that includes 0. It is finite only where the
    interval of the gap at the paper's rates is above 0.

    Returns:
        None with fewer than two common seeds, or where the gap's interval at the paper's rates is not above 0.

    Example:
        >>> str(share_of_rate({1: 2.0, 2: 2.0, 3: 2.0}, {1: 0.5, 2: 0.6, 3: 0.4}))
        '75 % [63, 87]'
    """
    seeds = sorted(at_papers.keys() & at_best.keys())
    if len(seeds) < 2:
        return None
    p, b = [at_papers[seed] for seed in seeds], [at_best[seed] for seed in seeds]
    if not interval(p).is_above_zero:
        return None
    factor = theory.student_quantile(len(seeds) - 1) ** 2 / len(seeds)
    mean_p, mean_b = statistics.fmean(p), statistics.fmean(b)
    # (mean_b - q mean_p)^2 = factor (var_b - 2 q cov + q^2 var_p), as square q^2 - 2 middle q + constant = 0
    square = mean_p**2 - factor * statistics.variance(p)
    middle = mean_p * mean_b - factor * statistics.covariance(p, b)
    constant = mean_b**2 - factor * statistics.variance(b)
    root = math.sqrt(max(middle**2 - square * constant, 0.0))
    return Share(
        value=1.0 - mean_b / mean_p,
        low=1.0 - (middle + root) / square,
        high=1.0 - (middle - root) / square,
        by_seed=tuple(1.0 - best / papers for papers, best in zip(p, b, strict=True)),
    )


def judged(gaps: Collection[Interval]) -> tuple[str, str]:
    """Whether Lion is below the other in all of ``gaps``: the start of a verdict, and Lion's side.

    The side is "below" or "above", and empty if the gaps differ or an interval includes 0.
    """
    one_seed = max(gap.seeds for gap in gaps) == 1
    if all(gap.is_above_zero for gap in gaps):
        return ("seen in one seed" if one_seed else "confirmed"), "below"
    if all(gap.is_below_zero for gap in gaps):
        return ("the opposite is seen in one seed" if one_seed else "the opposite is found"), "above"
    return ("not seen in one seed" if one_seed else "not confirmed"), ""


def counted_sides(gaps: Collection[Interval]) -> str:
    """In how many comparisons Lion is below and above the other, and how many intervals include 0.

    Example:
        >>> counted_sides([interval([1.0, 1.1]), interval([-1.0, 1.0])])
        'below in 1 of 2, above in 0, not decided in 1'
    """
    below, above = sum(gap.is_above_zero for gap in gaps), sum(gap.is_below_zero for gap in gaps)
    return f"below in {below} of {len(gaps)}, above in {above}, not decided in {len(gaps) - below - above}"
