"""The theorems' numbers against the proof's own intermediate form, and the estimates against independent ones."""

import math

import numpy as np
import pytest
import torch

from tools.paper import theory
from tools.paper.theory import Constants, Problem

BOX = {"weight_decay": 0.1, "linf_start": 10.0}
INTERIOR = {"weight_decay": 0.05, "linf_bound": 10.0}
UNIT = Problem(smoothness=1.0, sigma=1.0, gap=1.0, dimension=1)
ONES = Constants(c1=1.0, c2=1.0, c3=1.0)


def terms(bound: theory.Bound) -> list[float]:
    return [bound.gap, bound.start, bound.drift, bound.noise, bound.step]


def random_problem(generator: np.random.Generator) -> Problem:
    smoothness, sigma, gap = (10.0 ** generator.uniform(-2, 2, 3)).tolist()
    return Problem(smoothness=smoothness, sigma=sigma, gap=gap, dimension=int(generator.integers(1, 10**9)))


# ---- theorems and corollaries ----


def test_terms_1_3_4_are_exactly_1_4_6_times_the_corollarys_factor() -> None:
    """Fourth powers throughout, so that every root and quotient is exact in float64."""
    problem = Problem(smoothness=16.0, sigma=4.0, gap=16.0, dimension=4)
    constants = theory.corollary_constants(problem)
    assert (constants.c1, constants.c2, constants.c3) == (4.0, 4.0, 2.0)
    bound = theory.theorem_2(problem, constants, 2**16, **BOX)
    factor = theory.rate(problem, 2**16)
    assert factor == 1.0
    assert (bound.gap, bound.drift, bound.noise) == (factor, 4 * factor, 6 * factor)
    assert theory.corollary_3(problem, 2**16, **BOX) == theory.corollary_5(problem, 2**16, **INTERIOR) == 15.0


def test_terms_2_and_5_are_at_most_2_each_and_all_at_most_15_once_k_meets_the_condition() -> None:
    generator = np.random.default_rng(0)
    reached = 0.0
    for _ in range(300):
        problem = random_problem(generator)
        fewest = math.ceil(theory.corollary_steps(problem))
        for steps in (fewest, fewest + 1, 10 * fewest):
            bound = theory.theorem_2(
                problem, theory.corollary_constants(problem), steps, weight_decay=0.0, linf_start=1
            )
            in_factors = [term / theory.rate(problem, steps) for term in terms(bound)]
            assert [in_factors[0], in_factors[2], in_factors[3]] == pytest.approx([1.0, 4.0, 6.0], rel=1e-12)
            assert max(in_factors[1], in_factors[4]) <= 2.0 + 1e-12
            assert bound.total <= theory.corollary_3(problem, steps, weight_decay=0.0, linf_start=1) * (1 + 1e-12)
            reached = max(reached, in_factors[1], in_factors[4])
    assert reached > 1.9  # the condition is not stricter than need be


def test_the_theorems_terms_are_those_of_its_proof() -> None:
    """Section 4.3, before beta1, beta2 and eta are put in; Lemma 6 with 2 (1 - beta1) + (1 - beta2) for its modulus."""
    generator = np.random.default_rng(1)
    for _ in range(100):
        problem, steps = random_problem(generator), int(generator.integers(10**4, 10**9))
        c1, c2, c3 = (10.0 ** generator.uniform(-1, 1.5, 3)).tolist()
        constants = Constants(c1=c1, c2=c2, c3=c3)
        hyper = constants.hyperparameters(steps, problem.dimension)
        forget1, forget2, eta = 1 - hyper.beta1, 1 - hyper.beta2, hyper.lr
        root_d = math.sqrt(problem.dimension)
        from_the_proof = [
            problem.gap / (eta * steps),
            2 * root_d * problem.sigma / (steps * forget2),
            2 * root_d * 2 * problem.smoothness * eta * root_d / forget2,
            2 * root_d * (2 * forget1 + forget2) * problem.sigma / math.sqrt(forget2),
            2 * problem.dimension * problem.smoothness * eta,
        ]
        bound = theory.theorem_2(problem, constants, steps, weight_decay=0.0, linf_start=0.0)
        assert terms(bound) == pytest.approx(from_the_proof, rel=1e-9)
        assert bound.total == pytest.approx(sum(from_the_proof), rel=1e-9)
        assert terms(theory.theorem_4(problem, constants, steps, weight_decay=0.0, linf_bound=0.0)) == terms(bound)


def test_the_sgd_rate_has_a_fourth_root_and_the_dimension_a_square_root() -> None:
    problem = Problem(smoothness=2.0, sigma=3.0, gap=5.0, dimension=7)
    assert theory.rate(problem, 11) == pytest.approx(7**0.5 * 11**-0.25 * (9.0 * 2.0 * 5.0) ** 0.25, rel=1e-14)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: Problem(smoothness=0.0, sigma=1.0, gap=1.0, dimension=1), ("smoothness (L)", "> 0", "got 0")),
        (lambda: Problem(smoothness=1.0, sigma=-1.0, gap=1.0, dimension=1), ("sigma", ">= 0", "got -1")),
        (lambda: Problem(smoothness=1.0, sigma=1.0, gap=math.nan, dimension=1), ("f(theta_1) - f*", "nan")),
        (lambda: Problem(smoothness=1.0, sigma=1.0, gap=1.0, dimension=0), ("dimension (d)", ">= 1", "got 0")),
        (lambda: Constants(c1=1.0, c2=0.0, c3=1.0), ("c2", "> 0")),
        (lambda: Constants(c1=3.0, c2=4.0, c3=1.0).hyperparameters(15, 1), ("K) = 15", "K >= 16", "c2 = 4")),
        (lambda: ONES.hyperparameters(0, 1), ("steps (K)", ">= 1")),
        (lambda: theory.theorem_2(UNIT, ONES, 4, weight_decay=0.1, linf_start=11.0), ("11", "1/lambda = 10", "0.0909")),
        (lambda: theory.theorem_2(UNIT, ONES, 4, weight_decay=-1.0, linf_start=0.0), ("weight_decay (lambda)", ">= 0")),
        (lambda: theory.theorem_4(UNIT, ONES, 4, weight_decay=0.1, linf_bound=10.0), ("0.1", "C = 10", "= 0.05")),
        (lambda: theory.theorem_2(UNIT, ONES, 1, weight_decay=2.0, linf_start=0.5), ("lr * weight_decay", "lr to 0.5")),
        (
            lambda: theory.corollary_3(
                Problem(smoothness=7.0, sigma=1.0, gap=100.0, dimension=2), 699, weight_decay=0.1, linf_start=10.0
            ),
            ("K) = 699", "K >= 700"),
        ),
        (
            lambda: theory.corollary_5(
                Problem(smoothness=1.0, sigma=2.0, gap=1.0, dimension=2), 63, weight_decay=0.0, linf_bound=1.0
            ),
            ("K) = 63", "K >= 64"),
        ),
        (
            lambda: theory.corollary_constants(Problem(smoothness=1.0, sigma=0.0, gap=1.0, dimension=1)),
            ("sigma", "> 0"),
        ),
        (
            lambda: theory.corollary_steps(Problem(smoothness=1.0, sigma=1.0, gap=0.0, dimension=1)),
            ("f(theta_1) - f*", "> 0"),
        ),
    ],
)
def test_a_condition_that_is_not_met_is_named_with_what_would_meet_it(refused, words) -> None:
    with pytest.raises(ValueError) as error:
        refused()
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


# ---- the KKT residual ----


def test_the_residual_vanishes_exactly_at_kkt_points_of_the_box() -> None:
    """Lemma 1 for every sign of each component: at a face pushing outwards, or with no gradient; and nowhere else."""
    for theta in torch.cartesian_prod(*[torch.tensor([-4.0, -1.0, 0.0, 4.0])] * 2):
        for grad in torch.cartesian_prod(*[torch.tensor([-3.0, 0.0, 2.0])] * 2):
            kkt = bool(((grad == 0) | ((theta.abs() == 4.0) & (theta.sign() == -grad.sign()))).all())
            residual = theory.kkt_residual(grad, theta, 0.25)
            assert residual >= 0.0
            assert (residual.item() == 0.0) == kkt


def test_the_residual_is_non_negative_in_the_box_and_sums_over_the_dimension_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = 20 * torch.rand(1000, 7, generator=generator) - 10
    grad = torch.randn(1000, 7, generator=generator)
    each = theory.kkt_residual(grad, theta, 0.1, dim=1)
    assert each.shape == (1000,)
    assert each.dtype == torch.float64
    assert each.min() >= 0.0
    by_hand = [
        sum(0.1 * t * g + abs(g) for t, g in zip(row_t, row_g, strict=True))
        for row_t, row_g in zip(theta.tolist(), grad.tolist(), strict=True)
    ]
    assert each.tolist() == pytest.approx(by_hand, rel=1e-12, abs=1e-14)
    assert theory.kkt_residual(grad, theta, 0.1).item() == pytest.approx(sum(by_hand), rel=1e-12)
    assert theory.kkt_residual(torch.tensor([-1.0]), torch.tensor([11.0]), 0.1) < 0.0  # outside the box


# ---- rate constants ----


def test_the_rate_constants_are_the_smallest_that_hold_at_every_step() -> None:
    generator = np.random.default_rng(2)
    norms = generator.exponential(size=(5, 400)) * np.linspace(2, 0.1, 400)
    d = 1000
    lion = theory.lion_rate_constant(torch.from_numpy(norms), d)
    sgd = theory.sgd_rate_constant(torch.from_numpy(norms))
    averaged = norms.sum(axis=0) / 5
    left = [averaged[:k].sum() / k for k in range(1, 401)]
    for constant, scale in ((lion, math.sqrt(d)), (sgd, 1.0)):
        right = [constant.value * scale * k**-0.25 for k in range(1, 401)]
        slack = [(r - x) / r for x, r in zip(left, right, strict=True)]
        assert min(slack) == pytest.approx(0.0, abs=1e-12)
        assert slack[constant.at_step - 1] == min(slack)
        assert 1 < constant.at_step < 400


def test_records_with_gaps_are_placed_at_their_own_steps() -> None:
    constant = theory.lion_rate_constant([3.0, 1.0, 5.0], 9, steps=[1000, 2000, 10_000])
    assert constant.value == pytest.approx(max(3.0 * 1000**0.25, 2.0 * 2000**0.25, 3.0 * 10_000**0.25) / 3)
    assert constant.at_step == 10_000


@pytest.mark.parametrize(
    ("norms", "steps", "words"),
    [
        ([], None, "one record or more"),
        ([[[1.0]]], None, "(1, 1, 1)"),
        ([1.0, math.nan], None, "finite and >= 0"),
        ([1.0, -1.0], None, "finite and >= 0"),
        ([1.0, 2.0], [1], "2 increasing whole numbers"),
        ([1.0, 2.0], [0, 1], "from 1 on"),
        ([1.0, 2.0], [2, 2], "increasing"),
    ],
)
def test_records_that_say_nothing_are_refused(norms, steps, words: str) -> None:
    with pytest.raises(ValueError) as error:
        theory.sgd_rate_constant(norms, steps=steps)
    assert words in str(error.value)


# ---- exponents ----


def test_a_fit_equals_numpys_with_students_quantile() -> None:
    generator = np.random.default_rng(3)
    x = 10.0 ** np.linspace(4, 8, 7)
    y = 0.7 * x**0.5 * np.exp(0.05 * generator.standard_normal(7))
    fit = theory.fit_power_law(x.tolist(), y.tolist())
    (slope, intercept), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    half_width = 2.5705818 * math.sqrt(covariance[0, 0])  # t(0.975; 5), from a printed table
    assert fit.exponent == pytest.approx(slope, rel=1e-10)
    assert (fit.low, fit.high) == pytest.approx((slope - half_width, slope + half_width), rel=1e-6)
    assert fit.coefficient == pytest.approx(math.exp(intercept), rel=1e-8)
    assert fit.points == 7


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_holds_the_true_exponent_as_often_as_it_says(confidence: float) -> None:
    generator = np.random.default_rng(4)
    x = [1e4, 3e4, 1e5, 3e5, 1e6]
    hits = 0
    for _ in range(1000):
        y = [value**0.5 * math.exp(0.1 * noise) for value, noise in zip(x, generator.standard_normal(5), strict=True)]
        fit = theory.fit_power_law(x, y, confidence=confidence)
        hits += fit.low <= 0.5 <= fit.high
    assert hits / 1000 == pytest.approx(confidence, abs=4 * math.sqrt(confidence * (1 - confidence) / 1000))


@pytest.mark.parametrize(
    ("degrees", "confidence", "quantile"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.9, 2.35336), (4, 0.99, 4.60409), (30, 0.95, 2.04227)],
)
def test_the_interval_uses_students_quantile_of_the_printed_table(
    degrees: int, confidence: float, quantile: float
) -> None:
    x = np.geomspace(1e4, 1e6, degrees + 2)
    y = x**0.5 * np.exp(0.1 * np.random.default_rng(5).standard_normal(degrees + 2))
    fit = theory.fit_power_law(x.tolist(), y.tolist(), confidence=confidence)
    slope_error = math.sqrt(np.polyfit(np.log(x), np.log(y), 1, cov=True)[1][0, 0])
    assert (fit.high - fit.exponent) / slope_error == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize(
    ("x", "y", "confidence", "words"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.95, "three points"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], 0.95, "got 3 x, 2 y"),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.95, "all x are 2"),
        ([1.0, 2.0, 3.0], [1.0, 0.0, 3.0], 0.95, "> 0"),
        ([1.0, 2.0, math.inf], [1.0, 1.0, 3.0], 0.95, "finite"),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 3.0], 1.0, "confidence"),
    ],
)
def test_points_that_carry_no_exponent_are_refused(x, y, confidence: float, words: str) -> None:
    with pytest.raises(ValueError) as error:
        theory.fit_power_law(x, y, confidence=confidence)
    assert words in str(error.value)
