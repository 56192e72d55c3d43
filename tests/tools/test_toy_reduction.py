"""toy_reduction.py: what its ranks send is the toy's gradient, packed by the package."""

import pytest
import torch

from tools.paper import toy_convergence as toy
from tools.paper import toy_reduction

LAYOUTS = pytest.mark.parametrize("is_alone", [True, False], ids=["own block", "shared block"])


@LAYOUTS
def test_the_exact_scheme_has_the_toys_gradient_and_noise(is_alone: bool) -> None:
    case = toy.Case(start=(3.1, 6.4), constrained=False, weight_decay=0.05)
    shared = {"repeats": 3, "steps": 50, "seed": 2}
    exact = toy.simulate([case], **shared)
    mean = toy_reduction.Mean("fp32", runs=3, is_alone=is_alone)
    torch.testing.assert_close(toy.simulate([case], **shared, receive=mean).left, exact.left, rtol=1e-4, atol=0)


@LAYOUTS
@pytest.mark.parametrize("scheme", ["int4", "ternary"])
def test_what_is_not_sent_comes_later(scheme: str, is_alone: bool) -> None:
    """Sums over 100 steps: with error feedback they miss one residual, without it they miss one in each step."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(100, 40, 2, generator=generator, dtype=torch.float64) + 1

    def missing(name: str) -> float:
        mean = toy_reduction.Mean(name, runs=40, is_alone=is_alone)
        return float((torch.stack([mean(step) for step in steps]) - steps).sum(0).norm() / steps.sum(0).norm())

    assert missing("fp32") < 1e-6
    assert 1e-6 < 3 * missing(scheme) < missing(f"{scheme}-none")
