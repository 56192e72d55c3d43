"""The theorems of Dong, Li, Lin (2025) as numbers, and what a run's records say about them.

``bounds`` has the right-hand sides, the corollaries' hyperparameters and the KKT residual; ``records`` the smallest
constants for which a run keeps to the rate, and the exponent of a power law with its confidence interval. Needs torch
alone; every error is a ValueError.
"""

from tools.paper.theory.bounds import (
    COROLLARY_FACTOR,
    Bound,
    Constants,
    Hyperparameters,
    Problem,
    check_in_box,
    check_interior,
    corollary_3,
    corollary_5,
    corollary_constants,
    corollary_steps,
    kkt_residual,
    rate,
    theorem_2,
    theorem_4,
)
from tools.paper.theory.records import (
    PowerLaw,
    RateConstant,
    fit_power_law,
    half_width,
    lion_rate_constant,
    running_mean,
    sgd_rate_constant,
    student_quantile,
)

__all__ = [
    "COROLLARY_FACTOR",
    "Bound",
    "Constants",
    "Hyperparameters",
    "PowerLaw",
    "Problem",
    "RateConstant",
    "check_in_box",
    "check_interior",
    "corollary_3",
    "corollary_5",
    "corollary_constants",
    "corollary_steps",
    "fit_power_law",
    "half_width",
    "kkt_residual",
    "lion_rate_constant",
    "rate",
    "running_mean",
    "sgd_rate_constant",
    "student_quantile",
    "theorem_2",
    "theorem_4",
]
