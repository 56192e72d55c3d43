"""Whether the running means of figure A3 fall as the rate, and the exact norms of the gradient by step."""

import math

import torch

from tools.paper import theory
from tools.paper.reporting.findings import Judgement
from tools.paper.reporting.paper import L1, L2, Table
from tools.paper.reporting.study_runs import NAMES, Record, Records, StudyRuns, spread, steps_in_thousands
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS

RATE = -0.25  # the exponent of K that the theorems promise as an upper bound
NORMS = {"l1": L1, "l2": L2}
RISES, MIXED = "rises", "differs between the seeds"
HARDLY, SLOWER = r"falls slower than $K^{-1/4}$, if at all", r"falls slower than $K^{-1/4}$"
FASTER = r"falls faster than $K^{-1/4}$"
Groups = dict[str, Records]


def judged_norm(optimizer: str) -> str:
    """The norm that the theorem on ``optimizer`` is about: ``l1`` for Lion, ``l2`` for SGD."""
    return "l1" if optimizer == "lion_paper" else "l2"


def noise_factor(snr: float | None) -> float:
    """||grad f||_2 / ||mean gradient||_2 of a round, from its signal-to-noise ratio. It is 1 without noise.

    A record has None for an infinite ratio.
    """
    if snr is None or math.isinf(snr):
        return 1.0
    return math.sqrt(snr / (1.0 + snr)) if snr > 0.0 else 0.0


def round_norms(record: Record, norm: str, *, corrected: bool) -> dict[int, float]:
    """``norm`` (``l1`` or ``l2``) of each round by step; ``corrected`` applies :func:`noise_factor`."""
    rounds = record["rounds"]
    factors = [noise_factor(snr) if corrected else 1.0 for snr in rounds["snr"]]
    norms = [value * factor for value, factor in zip(rounds[norm], factors, strict=True)]
    return dict(zip(rounds["iteration"], norms, strict=True))


def slope(record: Record, norm: str, *, corrected: bool) -> float:
    """log(m_K / m_k) / log(K / k) of the running mean m of ``norm`` over all rounds, from k = 10,000 to K = 50,000.

    A mean that falls as K^(-1/4) has -0.25. ``corrected`` takes the noise out of each round.
    """
    norms = round_norms(record, norm, corrected=corrected)
    means = dict(zip(norms, theory.running_mean(torch.tensor(list(norms.values()))).tolist(), strict=True))
    return math.log(means[STEPS] / means[CHECKPOINTS[0]]) / math.log(STEPS / CHECKPOINTS[0])


def side(slopes: list[float]) -> str:
    """How the running mean changes in comparison with the rate, in all seeds."""
    if max(slopes) < RATE:
        return FASTER
    if min(slopes) <= RATE:
        return MIXED
    return RISES if min(slopes) > 0.0 else SLOWER if max(slopes) <= 0.0 else HARDLY


def _slopes(of_one: Records, name: str, *, corrected: bool) -> list[float]:
    return [slope(one, judged_norm(name), corrected=corrected) for one in of_one]


def _sides(groups: Groups) -> dict[str, str]:
    return {name: side(_slopes(of_one, name, corrected=True)) for name, of_one in groups.items()}


def about(groups: Groups) -> str:
    """Which running means fall as the rate, in a sentence."""
    said = [f"{NORMS[judged_norm(name)]} with {NAMES[name]} {word}" for name, word in _sides(groups).items()]
    return (
        f"From {CHECKPOINTS[0]:,} to {STEPS:,} steps, and corrected for noise, the running mean of "
        f"{'; the running mean of '.join(said)}. In the theorems betas and rates depend on $K$. These runs have "
        "constant betas and a cosine schedule, so the bound is not promised for them."
    )


def judgement(runs: StudyRuns, groups: Groups) -> Judgement:
    """Of the running means in figure A3."""
    numbers = [
        f"{NAMES[name]} {spread(_slopes(of_one, name, corrected=True))}, with noise "
        f"{spread(_slopes(of_one, name, corrected=False))}"
        for name, of_one in groups.items()
    ]
    return Judgement(
        claim=f"The running means of the norms fall as $K^{{-1/4}}$, {runs.where}",
        verdict=runs.mark + "; ".join(f"{NAMES[name]} {word}" for name, word in _sides(groups).items()),
        basis=runs.basis(*groups, seeds=len({one["seed"] for one in runs.records})),
        numbers=f"exponents of the running mean from {CHECKPOINTS[0]:,} to {STEPS:,} steps, corrected for noise: "
        + "; ".join(numbers),
    )


def table(groups: Groups) -> Table:
    """Both norms of the exact gradient at each checkpoint, and the exponent of the running mean of the judged one."""
    head = ["exact rounds", "norm", *steps_in_thousands((0, *CHECKPOINTS))]
    rows = [[*head, "exponent of the running mean, all rounds", "corrected for noise"]]
    for name, of_one in groups.items():
        for norm, words in NORMS.items():
            cells = [spread(one["exact"][str(step)][norm] for one in of_one) for step in (0, *CHECKPOINTS)]
            if norm == judged_norm(name):
                cells += [spread(_slopes(of_one, name, corrected=corrected)) for corrected in (False, True)]
            else:
                cells += ["-", "-"]
            rows.append([NAMES[name], words, *cells])
    return rows
