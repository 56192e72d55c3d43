"""How far Lion is ahead of SGD, with an interval over the seeds, and how much of it is the learning rate's."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A difference of two means."""

    mean: float
    half_width: float | None
    """of the 95 % interval; None where a group has one seed"""

    def __str__(self) -> str:
        interval = "one seed" if self.half_width is None else f"+- {self.half_width:.3f}"
        return f"{self.mean:.3f} ({interval})"


def gap(sgd: Sequence[float], lion: Sequence[float]) -> Gap:
    """SGD's mean loss minus Lion's: above 0 where Lion is better.

    The interval is t sqrt(s_1^2 / n_1 + s_2^2 / n_2) with n_1 + n_2 - 2 degrees of freedom, over independent seeds.

    Example:
        >>> str(gap([7.0, 7.2, 7.1], [5.0, 5.2, 5.1]))
        '2.000 (+- 0.227)'
    """
    mean = statistics.fmean(sgd) - statistics.fmean(lion)
    if min(len(sgd), len(lion)) < 2:
        return Gap(mean=mean, half_width=None)
    error = math.sqrt(sum(statistics.variance(group) / len(group) for group in (sgd, lion)))
    quantile = float(stdtrit(len(sgd) + len(lion) - 2, 0.5 + CONFIDENCE / 2))
    return Gap(mean=mean, half_width=quantile * error)


def share_of_rate(at_papers: Gap, at_tuned: Gap) -> str:
    """Which part of the gap at the paper's rates the learning rate explains, in a sentence."""
    if at_papers.mean <= 0.0:
        return f"There is no gap at the paper's rates ({at_papers}), so no part of it is the learning rate's."
    part = 1.0 - at_tuned.mean / at_papers.mean
    return (
        f"SGD's loss minus Lion's is {at_papers} at the paper's rates and {at_tuned} at each one's best rate: "
        f"{part:.0%} of the gap is the learning rate's."
    )
