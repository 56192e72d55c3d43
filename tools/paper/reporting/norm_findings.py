"""Whether the running means of figure A3 fall as the rate, and the exact norms of the gradient by step."""

import math

import torch

from tools.paper import theory
from tools.paper.reporting.findings import Judgement
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import NAMES, Record, Records, StudyRuns, spread, steps_in_thousands
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS

RATE = -0.25  # the exponent of K that the theorems promise as an upper bound
NORMS = {"l1": r"$\ell_1$", "l2": r"$\ell_2$"}
RISES, SLOWER, FASTER, MIXED = "rises", "falls slower", "falls faster", "differs between the seeds"
Groups = dict[str, Records]


def judged_norm(optimizer: str) -> str:
    """The norm that the theorem on ``optimizer`` is about: ``l1`` for Lion, ``l2`` for SGD."""
    return "l1" if optimizer == "lion_paper" else "l2"


def slope(record: Record, norm: str) -> float:
    """log(m_K / m_k) / log(K / k) of the running mean m of ``norm`` over all rounds, from k = 10,000 to K = 50,000.

    A mean that falls as K^(-1/4) has -0.25.
    """
    rounds = record["rounds"]
    means = dict(zip(rounds["iteration"], theory.running_mean(torch.tensor(rounds[norm])).tolist(), strict=True))
    return math.log(means[STEPS] / means[CHECKPOINTS[0]]) / math.log(STEPS / CHECKPOINTS[0])


def side(slopes: list[float]) -> str:
    """How the running mean changes in comparison with the rate, if the seeds agree."""
    found = {RISES if one > 0.0 else SLOWER if one > RATE else FASTER for one in slopes}
    return found.pop() if len(found) == 1 else MIXED


def _slopes(groups: Groups) -> dict[str, list[float]]:
    return {name: [slope(one, judged_norm(name)) for one in of_one] for name, of_one in groups.items()}


def about(groups: Groups) -> str:
    """Which running means fall as the rate, in a sentence."""
    said = [f"{NORMS[judged_norm(name)]} with {NAMES[name]} {side(each)}" for name, each in _slopes(groups).items()]
    return (
        f"From {CHECKPOINTS[0]:,} to {STEPS:,} steps, and compared with $K^{{-1/4}}$, the running mean of "
        f"{'; that of '.join(said)}. It includes the noise of the rounds; the exact norms are in the table. In the "
        "theorems betas and rates depend on $K$. These runs have constant betas and a cosine schedule, so the bound is "
        "not promised for them."
    )


def judgement(runs: StudyRuns, groups: Groups) -> Judgement:
    """Of the running means in figure A3."""
    found = _slopes(groups)
    return Judgement(
        claim=f"The running means of the norms fall as $K^{{-1/4}}$, {runs.where}",
        verdict=runs.mark + "; ".join(f"{NAMES[name]} {side(each)}" for name, each in found.items()),
        basis=runs.basis(*groups, seeds=len({one["seed"] for one in runs.records})),
        numbers=f"exponents of the running mean from {CHECKPOINTS[0]:,} to {STEPS:,} steps: "
        + "; ".join(f"{NAMES[name]} {spread(each)}" for name, each in found.items()),
    )


def table(groups: Groups) -> Table:
    """Both norms of the exact gradient at each checkpoint, and the exponent of the running mean of the judged one."""
    head = ["exact rounds", "norm", *steps_in_thousands((0, *CHECKPOINTS))]
    rows = [[*head, "exponent of the running mean, all rounds"]]
    for name, of_one in groups.items():
        for norm, words in NORMS.items():
            cells = [spread(one["exact"][str(step)][norm] for one in of_one) for step in (0, *CHECKPOINTS)]
            own = spread(slope(one, norm) for one in of_one) if norm == judged_norm(name) else "-"
            rows.append([NAMES[name], words, *cells, own])
    return rows
