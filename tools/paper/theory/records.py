"""What the records of a run say: the rate constants of (A1) and (A2), and exponents with their intervals."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from tools.paper.theory.checks import check_count, check_number


@dataclass(frozen=True, kw_only=True)
class RateConstant:
    """The smallest c for which (A1) or (A2) holds at every recorded K, and the K that decides it."""

    value: float
    at_step: int


def lion_rate_constant(
    l1_norms: Tensor | Sequence[float], dimension: int, *, steps: Sequence[int] | None = None
) -> RateConstant:
    """The smallest c_LION of (A2), (1/K) sum_k E||grad f(theta_k)||_1 <= c_LION sqrt(d) K^(-1/4) for every K::

        c_LION = max_K K^(1/4) (running mean of ||grad f||_1 up to K) / sqrt(d)

    Args:
        l1_norms: the gradient's l1 norm at each record, shape (records,), or (repeats, records), averaged over repeats
            first.
        dimension: d.
        steps: the step k >= 1 of each record, increasing; 1, 2, 3, ... unless given. With gaps between the records
            their mean stands in for the mean over the steps.

    Raises ValueError for no records, a norm that is negative or not finite, or steps that do not fit.

    Example:
        >>> lion_rate_constant([4.0, 4.0, 1.0], dimension=4)
        RateConstant(value=2.378414230005442, at_step=2)
    """
    check_count("dimension (d)", dimension)
    return _rate_constant(l1_norms, math.sqrt(dimension), steps)


def sgd_rate_constant(l2_norms: Tensor | Sequence[float], *, steps: Sequence[int] | None = None) -> RateConstant:
    """The smallest c_SGD of (A1), (1/K) sum_k E||grad f(theta_k)||_2 <= c_SGD K^(-1/4) for every K.

    Args as :func:`lion_rate_constant`, of l2 norms; there is no sqrt(d).

    Example:
        >>> sgd_rate_constant([2.0, 2.0], steps=[1, 16])
        RateConstant(value=4.0, at_step=16)
    """
    return _rate_constant(l2_norms, 1.0, steps)


def running_mean(values: Tensor) -> Tensor:
    """(1/k) sum_{i <= k} values_i along the last dimension, in float64, the same shape.

    Example:
        >>> running_mean(torch.tensor([2.0, 4.0, 0.0])).tolist()
        [2.0, 3.0, 2.0]
    """
    return values.double().cumsum(-1) / torch.arange(1, values.shape[-1] + 1, dtype=torch.float64, device=values.device)


def student_quantile(degrees: int, confidence: float = 0.95) -> float:
    """Student's t for a two-sided interval with so many degrees of freedom.

    Example:
        >>> round(student_quantile(2), 3)
        4.303
    """
    return float(stdtrit(degrees, 0.5 + confidence / 2))


def half_width(values: Tensor, *, confidence: float = 0.95) -> Tensor:
    """Half the width of the interval of the mean over the first dimension: t s / sqrt(n), n - 1 degrees of freedom.

    It is of the remaining shape, in float64. Exact where the values are independent and normal. Raises ValueError for
    fewer than two values.

    Example:
        >>> round(half_width(torch.tensor([1.0, 2.0, 3.0])).item(), 3)
        2.484
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval of a mean needs two values or more, got {count}")
    return student_quantile(count - 1, confidence) * values.double().std(0) / math.sqrt(count)


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = coefficient * x^exponent, and the exponent's confidence interval."""

    exponent: float
    low: float
    high: float
    coefficient: float
    points: int

    def __str__(self) -> str:
        return f"{self.exponent:.3f} [{self.low:.3f}, {self.high:.3f}]"


def fit_power_law(x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95) -> PowerLaw:
    """Least squares of log y against log x: the exponent of r against d, or of a bound's left side against K.

    The interval is exponent +- t sqrt(s^2 / S_xx), s^2 the residuals' variance with n - 2 degrees of freedom and t
    Student's quantile: exact where the logarithms scatter independently, normally and alike around the line. Points of
    one run at several times do not scatter independently; an interval from them is too narrow.

    Raises ValueError for fewer than three points, fewer than two different x, or a value that is not finite and > 0.

    Example:
        >>> fit = fit_power_law([1.0, 4.0, 16.0, 64.0], [1.1, 1.9, 4.1, 7.9])
        >>> round(fit.exponent, 3), round(fit.low, 3), round(fit.high, 3)
        (0.482, 0.391, 0.573)
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"a fit with an interval needs three points or more, each with x and y: got {len(x)} x, {len(y)} y"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence:g}; the usual value is 0.95")
    for value in (*x, *y):
        check_number("x and y", float(value), positive=True)
    log_x = torch.tensor([math.log(value) for value in x], dtype=torch.float64)
    log_y = torch.tensor([math.log(value) for value in y], dtype=torch.float64)
    dx, dy = log_x - log_x.mean(), log_y - log_y.mean()
    spread = float(dx @ dx)
    if spread == 0.0:
        raise ValueError(f"all x are {x[0]:g}: an exponent needs at least two different ones")
    exponent = float(dx @ dy) / spread
    variance = float((dy - exponent * dx).square().sum()) / (len(x) - 2)
    half = student_quantile(len(x) - 2, confidence) * math.sqrt(variance / spread)
    return PowerLaw(
        exponent=exponent,
        low=exponent - half,
        high=exponent + half,
        coefficient=math.exp(float(log_y.mean()) - exponent * float(log_x.mean())),
        points=len(x),
    )


def _rate_constant(norms: Tensor | Sequence[float], scale: float, steps: Sequence[int] | None) -> RateConstant:
    values = torch.as_tensor(norms, dtype=torch.float64)
    if values.dim() not in (1, 2) or values.numel() == 0:
        raise ValueError(
            f"norms must have shape (records,) or (repeats, records) with one record or more, got {tuple(values.shape)}"
        )
    if not bool(((values >= 0.0) & values.isfinite()).all()):
        raise ValueError("norms must be finite and >= 0: leave out the rounds of a run that diverged, or cut it before")
    values = values.mean(0) if values.dim() == 2 else values
    at = list(range(1, len(values) + 1)) if steps is None else [int(step) for step in steps]
    if len(at) != len(values) or at[0] < 1 or any(one >= two for one, two in itertools.pairwise(at)):
        raise ValueError(
            f"steps must be {len(values)} increasing whole numbers from 1 on, one for each record, got {at}"
        )
    bounds = running_mean(values) * torch.tensor(at, dtype=torch.float64) ** 0.25 / scale
    index = int(bounds.argmax())
    return RateConstant(value=float(bounds[index]), at_step=at[index])
