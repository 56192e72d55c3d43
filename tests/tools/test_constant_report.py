"""When c_LION and c_SGD of the long runs say something: without noise, and in every way of measuring."""

import math

import pytest

from tools.paper.reporting import constant_findings, norm_findings
from tools.paper.reporting.constant_findings import CORRECTED, IN_L1, IN_L2, RAW
from tools.paper.reporting.formulas import C_LION


def constants_of(
    l1: float = 1.0, l2: float = 1.0, snr: float = math.inf, exact: float = 1.0, fall: float = 2.0
) -> dict[constant_findings.Source, constant_findings.Constant]:
    """Of one seed with d = 1 and norms that fall as k^(-fall)."""
    steps = [1, 2, 3]
    norms = {"l1": [l1 * step**-fall for step in steps], "l2": [l2 * step**-fall for step in steps]}
    rounds = {"iteration": steps, "snr": [None if math.isinf(snr) else snr] * 3, **norms}
    exacts = {str(step): {"l1": exact * step**-fall, "l2": exact * step**-fall} for step in steps}
    return constant_findings.measure([{"d": 1, "seed": 1, "rounds": rounds, "exact": exacts}])


def test_noise_is_taken_out_of_the_norm() -> None:
    """||mean||^2 = ||grad f||^2 + noise: with 16 + 9 the snr is 16 / 9, and 4 is left of 5."""
    assert 5.0 * norm_findings.noise_factor(16 / 9) == pytest.approx(4.0)
    assert norm_findings.noise_factor(-0.5) == 0.0 and norm_findings.noise_factor(None) == 1.0
    found = constants_of(l2=5.0, snr=16 / 9)
    assert found[IN_L2, CORRECTED].value == pytest.approx(0.8 * found[IN_L2, RAW].value)


@pytest.mark.parametrize(
    ("lion", "sgd", "expected", "reason"),
    [
        ({}, {"l2": 2.0, "exact": 2.0}, "holds", "The order is the same however it is measured."),
        ({"l1": 2.0, "l2": 2.0, "exact": 2.0}, {}, "does not hold", "The order is the same"),
        (
            {"l2": 3.0},
            {"l2": 2.0, "exact": 2.0},
            "not established",
            f"{C_LION} is above in {IN_L2}.",
        ),
        ({}, {"l2": 2.0}, "holds", "The order is the same"),  # exact rounds have equal constants, and are not judged
        ({}, {}, "not established", "The seeds' ranges overlap in"),
        (
            {},
            {"l2": 2.0, "exact": 2.0, "snr": 0.1},
            "not established",
            f"{C_LION} is above in {IN_L1} (corrected for noise)",
        ),
        ({"fall": 0.0}, {"l2": 9.0, "exact": 9.0}, "not established", f"The last step decides {C_LION}: a longer run"),
    ],
)
def test_constants_are_established_only_if_every_way_agrees(
    lion: dict[str, float], sgd: dict[str, float], expected: str, reason: str
) -> None:
    word, reasons = constant_findings.verdict(constants_of(**lion), constants_of(**sgd))
    assert word == expected and reason in reasons


@pytest.mark.parametrize(
    ("exponent", "side"),
    [(0.5, norm_findings.RISES), (-0.1, norm_findings.SLOWER), (-0.5, norm_findings.FASTER)],
)
def test_running_means_are_compared_with_the_rate(exponent: float, side: str) -> None:
    """A sum of k^exponent is about K^(1 + exponent) / (1 + exponent), so the mean has the exponent of the norm."""
    steps = list(range(1000, 51_000, 1000))
    rounds = {"iteration": steps, "l1": [step**exponent for step in steps], "snr": [1.0] * len(steps)}
    found = norm_findings.slope({"rounds": rounds}, "l1", corrected=True)  # equal noise changes no exponent
    assert found == pytest.approx(exponent, abs=0.1) and norm_findings.side([found, found]) == side


def test_seeds_on_both_sides_of_0_or_of_the_rate_are_no_order() -> None:
    assert norm_findings.side([-0.02, 0.01]) == norm_findings.HARDLY
    assert norm_findings.side([-0.3, -0.2]) == norm_findings.MIXED


def test_an_exponent_is_without_the_noise_that_grows() -> None:
    """The gradient has a norm of 1 throughout; the noise adds 0 at first and 3 times its square at the end."""
    steps = list(range(1000, 51_000, 1000))
    snr = [None if step <= 10_000 else 1 / 3 for step in steps]
    l2 = [1.0 if ratio is None else 2.0 for ratio in snr]
    record = {"rounds": {"iteration": steps, "l2": l2, "snr": snr}}
    assert norm_findings.slope(record, "l2", corrected=True) == pytest.approx(0.0)
    assert norm_findings.slope(record, "l2", corrected=False) > 0.3
