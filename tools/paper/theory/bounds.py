"""The theorems of Dong, Li, Lin (2025), "Convergence Rate Analysis of LION", DOI 10.11897/SP.J.1016.2025.02008.

The problem is min f(theta) over R^d, or over the box ||theta||_inf <= 1/lambda. f is L-smooth; the stochastic gradient
g is unbiased with E||g - grad f||_2^2 <= sigma^2; D = f(theta_1) - f*; K steps. Lion starts from m_0 = g_1
(``Lion(momentum_init="gradient")``), lambda is its weight decay and eta its learning rate.

Two readings differ from the printed text, where the algebra says so: the root in (3), (9), (13) is a fourth root, and
the first conclusion of Theorem 2 is two statements (theta_k stays in the box; the KKT residual stays non-negative).
"""

import math
from dataclasses import astuple, dataclass

from torch import Tensor

from tools.paper.theory.checks import check_count, check_number

COROLLARY_FACTOR = 15.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The constants of Assumptions 1 to 3 and of the start. Raises ValueError for one that is out of range."""

    smoothness: float
    """L > 0: ||grad f(x) - grad f(y)||_2 <= L ||x - y||_2"""
    sigma: float
    """sigma >= 0, the root of the bound on the gradient noise E||g - grad f||_2^2 of one step"""
    gap: float
    """D = f(theta_1) - f* >= 0"""
    dimension: int
    """d >= 1"""

    def __post_init__(self) -> None:
        check_number("smoothness (L)", self.smoothness, positive=True)
        check_number("sigma", self.sigma)
        check_number("gap (D = f(theta_1) - f*)", self.gap)
        check_count("dimension (d)", self.dimension)


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What Lion is run with."""

    beta1: float
    beta2: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class Constants:
    """c1, c2, c3 of Theorems 2 and 4, independent of K and d; all > 0, else ValueError."""

    c1: float
    c2: float
    c3: float

    def __post_init__(self) -> None:
        for name, value in (("c1", self.c1), ("c2", self.c2), ("c3", self.c3)):
            check_number(name, value, positive=True)

    def hyperparameters(self, steps: int, dimension: int) -> Hyperparameters:
        """beta1 = 1 - c1 / sqrt(K), beta2 = 1 - c2 / sqrt(K), eta = c3 / (sqrt(d) K^(3/4)) for a run of K ``steps``.

        Raises ValueError where K < max(c1, c2)^2, which would make a beta negative.

        Example:
            >>> Constants(c1=1.0, c2=2.0, c3=3.0).hyperparameters(steps=10_000, dimension=9)
            Hyperparameters(beta1=0.99, beta2=0.98, lr=0.001)
        """
        check_count("steps (K)", steps)
        check_count("dimension (d)", dimension)
        needed = max(self.c1, self.c2) ** 2
        if steps < needed:
            raise ValueError(
                f"steps (K) = {steps} makes a beta negative: 1 - c / sqrt(K) >= 0 needs K >= {math.ceil(needed)} with "
                f"c1 = {self.c1:g}, c2 = {self.c2:g}"
            )
        root = math.sqrt(steps)
        return Hyperparameters(
            beta1=1.0 - self.c1 / root,
            beta2=1.0 - self.c2 / root,
            lr=self.c3 / (math.sqrt(dimension) * root * math.sqrt(root)),
        )


@dataclass(frozen=True)
class Bound:
    """The five terms on the right of Theorem 2 (ii) and Theorem 4, in the order in which they are printed."""

    gap: float
    """D sqrt(d) / (c3 K^1/4)"""
    start: float
    """2 sigma sqrt(d) / (c2 K^1/2): the noise of m_0 = g_1"""
    drift: float
    """4 L c3 sqrt(d) / (c2 K^1/4): the momentum lags behind the gradient"""
    noise: float
    """2 sigma (2 c1 + c2) sqrt(d) / (sqrt(c2) K^1/4): what the momentum does not average away"""
    step: float
    """2 L c3 sqrt(d) / K^3/4"""

    @property
    def total(self) -> float:
        """The right-hand side."""
        return math.fsum(astuple(self))


def check_in_box(linf: float, weight_decay: float) -> None:
    """Theorem 2's condition on the start, ||theta_1||_inf <= 1/lambda, or ValueError. Always true for lambda = 0."""
    check_number("linf", linf)
    check_number("weight_decay (lambda)", weight_decay)
    if weight_decay * linf > 1.0:
        raise ValueError(
            f"||theta_1||_inf = {linf:g} lies outside the box 1/lambda = {1 / weight_decay:g}: start inside it, or "
            f"lower weight_decay to {1 / linf:g}"
        )


def check_interior(linf: float, weight_decay: float) -> None:
    """Theorem 4's condition lambda <= 1/(2C), or ValueError; ``linf`` is C, at least ||theta_k||_inf for every k."""
    check_number("linf", linf)
    check_number("weight_decay (lambda)", weight_decay)
    if 2.0 * weight_decay * linf > 1.0:
        raise ValueError(
            f"weight_decay = {weight_decay:g} is too large for iterates as large as C = {linf:g}: the unconstrained "
            f"case needs lambda <= 1/(2C) = {1 / (2 * linf):g}"
        )


def check_lr(lr: float, weight_decay: float) -> None:
    """eta lambda <= 1, or ValueError. The theorems do not say so, but without it a step can leave the box."""
    check_number("lr", lr)
    check_number("weight_decay (lambda)", weight_decay)
    if lr * weight_decay > 1.0:
        raise ValueError(
            f"lr * weight_decay = {lr * weight_decay:g} is above 1, so a step can leave the box: lower lr to "
            f"{1 / weight_decay:g}"
        )


def theorem_2(problem: Problem, constants: Constants, steps: int, *, weight_decay: float, linf_start: float) -> Bound:
    """The right-hand side of Theorem 2 (ii), term by term::

        mean_k E[ lambda <grad f(theta_k), theta_k> + ||grad f(theta_k)||_1 ]
            <=  D sqrt(d) / (c3 K^1/4)  +  2 sigma sqrt(d) / (c2 K^1/2)  +  4 L c3 sqrt(d) / (c2 K^1/4)
                + 2 sigma (2 c1 + c2) sqrt(d) / (sqrt(c2) K^1/4)  +  2 L c3 sqrt(d) / K^3/4

    for Lion with ``constants.hyperparameters(steps, d)``. The fourth term is as stated; the proof has |c1 - c2| + c1
    in the place of 2 c1 + c2, a third of it for c1 = c2.

    Args:
        problem: L, sigma, D, d.
        constants: c1, c2, c3.
        steps: K.
        weight_decay: lambda.
        linf_start: ||theta_1||_inf.

    Raises ValueError where the start lies outside the box, a beta would be negative or eta lambda > 1.

    Example:
        >>> problem = Problem(smoothness=1.0, sigma=1.0, gap=1.0, dimension=4)
        >>> constants = Constants(c1=1.0, c2=1.0, c3=1.0)
        >>> bound = theorem_2(problem, constants, 10_000, weight_decay=0.1, linf_start=10.0)
        >>> [round(term, 3) for term in (bound.gap, bound.start, bound.drift, bound.noise, bound.step)]
        [0.2, 0.04, 0.8, 1.2, 0.004]
        >>> round(bound.total, 3)
        2.244
    """
    check_in_box(linf_start, weight_decay)
    check_lr(constants.hyperparameters(steps, problem.dimension).lr, weight_decay)
    return _terms(problem, constants, steps)


def theorem_4(problem: Problem, constants: Constants, steps: int, *, weight_decay: float, linf_bound: float) -> Bound:
    """The right-hand side of Theorem 4, the same five terms, here a bound on (1/2) mean_k E||grad f(theta_k)||_1.

    Args as :func:`theorem_2`, but ``linf_bound`` is C, with ||theta_k||_inf <= C for every k. f must be coercive.
    Raises ValueError where lambda > 1/(2C), a beta would be negative or eta lambda > 1.
    """
    check_interior(linf_bound, weight_decay)
    check_lr(constants.hyperparameters(steps, problem.dimension).lr, weight_decay)
    return _terms(problem, constants, steps)


def corollary_constants(problem: Problem) -> Constants:
    """c1 = c2 = sqrt(L D) / sigma and c3 = D^(3/4) / (L^(1/4) sigma^(1/2)) of Corollaries 3 and 5.

    Raises ValueError for sigma = 0 or D = 0, which leave nothing to choose.

    Example:
        >>> corollary_constants(Problem(smoothness=16.0, sigma=4.0, gap=16.0, dimension=2))
        Constants(c1=4.0, c2=4.0, c3=2.0)
    """
    check_number("sigma", problem.sigma, positive=True)
    check_number("gap (D = f(theta_1) - f*)", problem.gap, positive=True)
    c = math.sqrt(problem.smoothness * problem.gap) / problem.sigma
    return Constants(
        c1=c, c2=c, c3=_fourth_root(problem.gap) ** 3 / (_fourth_root(problem.smoothness) * math.sqrt(problem.sigma))
    )


def corollary_steps(problem: Problem) -> float:
    """The fewest steps for which the corollaries hold: K >= max(sigma^6 / (L D)^3, L D / sigma^2).

    Example:
        >>> corollary_steps(Problem(smoothness=7.0, sigma=1.0, gap=100.0, dimension=2))
        700.0
    """
    check_number("sigma", problem.sigma, positive=True)
    check_number("gap (D = f(theta_1) - f*)", problem.gap, positive=True)
    signal = problem.smoothness * problem.gap / problem.sigma**2
    return max(signal**-3, signal)


def corollary_3(problem: Problem, steps: int, *, weight_decay: float, linf_start: float) -> float:
    """The right-hand side of (9), 15 sqrt(d) K^(-1/4) (sigma^2 L D)^(1/4), a bound on the left side of Theorem 2 (ii).

    Raises ValueError where K is below :func:`corollary_steps`, or as :func:`theorem_2`.

    Example:
        >>> problem = Problem(smoothness=16.0, sigma=4.0, gap=16.0, dimension=4)
        >>> corollary_3(problem, 10_000, weight_decay=0.1, linf_start=10.0)
        24.0
    """
    _check_steps(problem, steps)
    theorem_2(problem, corollary_constants(problem), steps, weight_decay=weight_decay, linf_start=linf_start)
    return COROLLARY_FACTOR * rate(problem, steps)


def corollary_5(problem: Problem, steps: int, *, weight_decay: float, linf_bound: float) -> float:
    """The right-hand side of (13), the same number, here a bound on (1/2) mean_k E||grad f(theta_k)||_1.

    Raises ValueError where K is below :func:`corollary_steps`, or as :func:`theorem_4`.
    """
    _check_steps(problem, steps)
    theorem_4(problem, corollary_constants(problem), steps, weight_decay=weight_decay, linf_bound=linf_bound)
    return COROLLARY_FACTOR * rate(problem, steps)


def rate(problem: Problem, steps: int) -> float:
    """sqrt(d) K^(-1/4) (sigma^2 L D)^(1/4): with the corollaries' constants, terms 1, 3 and 4 are 1, 4 and 6 times this
    and terms 2 and 5 at most 2 times each.

    Defined for every K, also where the corollaries promise nothing, as the dashed lines of figure A2 begin at k = 1.

    Example:
        >>> rate(Problem(smoothness=16.0, sigma=4.0, gap=16.0, dimension=4), 10_000)
        1.6
    """
    check_count("steps (K)", steps)
    scale = _fourth_root(problem.smoothness) * _fourth_root(problem.gap) * math.sqrt(problem.sigma)
    return math.sqrt(problem.dimension) * scale / _fourth_root(steps)


def kkt_residual(grad: Tensor, theta: Tensor, weight_decay: float | Tensor, *, dim: int | None = None) -> Tensor:
    """lambda <grad f(theta), theta> + ||grad f(theta)||_1 in float64.

    Non-negative in the box ||theta||_inf <= 1/lambda (Theorem 2, i), and 0 there exactly at the KKT points (Lemma 1).

    Args:
        grad: grad f(theta), any shape.
        theta: the same shape.
        weight_decay: lambda, or a tensor of them that broadcasts.
        dim: the dimension to sum over; None sums over all.

    Example:
        >>> import torch
        >>> grad, theta = torch.tensor([3.0, -4.0]), torch.tensor([-10.0, 10.0])
        >>> kkt_residual(grad, theta, 0.1).item()
        0.0
        >>> kkt_residual(grad, -theta, 0.1).item()
        14.0
    """
    g = grad.double()
    terms = weight_decay * (g * theta.double()) + g.abs()
    return terms.sum() if dim is None else terms.sum(dim)


def _terms(problem: Problem, constants: Constants, steps: int) -> Bound:
    c1, c2, c3 = constants.c1, constants.c2, constants.c3
    smoothness, sigma, root_d = problem.smoothness, problem.sigma, math.sqrt(problem.dimension)
    half = math.sqrt(steps)
    quarter = math.sqrt(half)
    return Bound(
        gap=problem.gap * root_d / (c3 * quarter),
        start=2 * sigma * root_d / (c2 * half),
        drift=4 * smoothness * c3 * root_d / (c2 * quarter),
        noise=2 * sigma * (2 * c1 + c2) * root_d / (math.sqrt(c2) * quarter),
        step=2 * smoothness * c3 * root_d / (half * quarter),
    )


def _check_steps(problem: Problem, steps: int) -> None:
    check_count("steps (K)", steps)
    if steps < corollary_steps(problem):
        raise ValueError(
            f"steps (K) = {steps} is below max(sigma^6 / (L D)^3, L D / sigma^2) = {corollary_steps(problem):g}: the "
            f"corollary says nothing for so short a run; take K >= {math.ceil(corollary_steps(problem))}"
        )


def _fourth_root(value: float) -> float:
    """Two square roots, each correctly rounded: exact for fourth powers, which value ** 0.25 need not be."""
    return math.sqrt(math.sqrt(value))
