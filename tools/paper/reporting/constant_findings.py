"""Figure A3 from the long runs: c_LION and c_SGD, with and without the noise of a round."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tools.paper import theory
from tools.paper.reporting import drawings, norm_findings
from tools.paper.reporting.curve_findings import converged
from tools.paper.reporting.findings import Finding, Judgement, sentence
from tools.paper.reporting.formulas import C_LION, C_SGD
from tools.paper.reporting.paper import L2, Table
from tools.paper.reporting.rate_findings import L1_OVER_ROOT, PAPERS
from tools.paper.reporting.study_runs import NAMES, SGDS, Record, Records, StudyRuns, in_seeds, listed_rates
from tools.paper.studies import rates
from tools.paper.studies.rates import NORMS

RAW, CORRECTED, EXACT = "all rounds", "corrected for noise", "exact rounds from 10k"
IN_L1, IN_L2 = L1_OVER_ROOT, L2
SOURCES = (RAW, CORRECTED, EXACT)
JUDGED = (RAW, CORRECTED)  # the first exact norm represents 10,000 steps and can miss an earlier maximum
Source = tuple[str, str]  # norm, and which rounds
BELOW, ABOVE, MIXED = f"{C_LION} is below", f"{C_LION} is above", "The seeds' ranges overlap"
NOISE = (
    r"Noise adds to the norm of a mean gradient. Corrected for noise, $\Vert \nabla f \Vert_2$ is "
    r"$\ell_2 \sqrt{s / (1 + s)}$, where $s$ is the signal-to-noise ratio, and 0 for $s \le 0$. $\ell_1$ gets the same "
    "factor, which overestimates it, because noise raises $r$. Rounds of batches have dropout; exact rounds have none, "
    "and their norms can be larger. Constants of exact rounds are taken from 10k on and are not judged: one that is "
    "decided before has no record there. (A1) is about SGD without momentum"
)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A constant of the seeds' mean norm, as the theorems have it, and of each seed."""

    value: float
    at_step: int
    last_step: int
    by_seed: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        span = f" ({min(self.by_seed):.3f} to {max(self.by_seed):.3f})" if len(self.by_seed) > 1 else ""
        return f"{self.value:.3f}{span}"

    @property
    def is_of_last_step(self) -> bool:
        return self.at_step == self.last_step


def constants(runs: StudyRuns) -> Finding:
    """Both constants of each optimizer, and whether c_LION is below c_SGD however they are measured."""
    groups = {name: of_one for name, of_one in runs.by_optimizer().items() if name in ("lion_paper", *SGDS)}
    if "lion_paper" not in groups or len(groups) < 2:
        return Finding(verdict=f"Cannot be said {runs.where}: LION and SGD are needed.", made="")
    found = {name: measure(of_one) for name, of_one in groups.items()}
    words = {name: verdict(found["lion_paper"], found[name]) for name in groups if name in SGDS}
    seeds = {name: min(len(groups["lion_paper"]), len(groups[name])) for name in words}
    said = [
        f"{sentence(runs.mark)}{C_LION} below {C_SGD} of {NAMES[name]}: {word}{_of_one_seed(seeds[name])} {runs.where} "
        f"({runs.basis('lion_paper', name, seeds=seeds[name])}). {reasons}"
        for name, (word, reasons) in words.items()
    ]
    judgements = [
        Judgement(
            claim=f"{C_LION} is below {C_SGD} ({NAMES[name]}), {runs.where}",
            verdict=f"{runs.mark}{word}{_of_one_seed(seeds[name])}. {reasons}",
            basis=runs.basis("lion_paper", name, seeds=seeds[name]),
            numbers=f"{RAW}: {C_LION} {found['lion_paper'][IN_L1, RAW]}, in {IN_L2} {found['lion_paper'][IN_L2, RAW]}; "
            f"{C_SGD} {found[name][IN_L2, RAW]}",
            plain=f"{C_LION} below {C_SGD} of {NAMES[name]} {runs.where}: {word}." if name == "sgd_paper" else "",
        )
        for name, (word, reasons) in words.items()
    ]
    no_plain = "" if "sgd_paper_no_momentum" in groups else ", which has no runs here"
    return Finding(
        verdict=" ".join([*said, norm_findings.about(groups), f"{NOISE}{no_plain}."]),
        made="",
        pictures={"from all rounds of 100 batches, with their noise": _picture(groups)}
        if "sgd_paper" in groups
        else {},
        tables=[_table(groups, found), norm_findings.table(groups)],
        judgements=[*judgements, norm_findings.judgement(runs, groups)],
    )


def _picture(groups: dict[str, Records]) -> str:
    """Figure A3 of LION and of SGD with momentum."""
    repeats = {}
    for name in ("lion", "sgd"):
        records = groups[f"{name}_paper"]
        repeats[name] = {
            **{"steps": records[0]["rounds"]["iteration"], "d": records[0]["d"]},
            **{"norms": [one["rounds"][NORMS[name]] for one in records]},
            **{"l2_norms": [one["rounds"]["l2"] for one in records], "lr": records[0]["settings"]["lr"]},
        }
    return drawings.constants(groups, NAMES, rates.constants(repeats))


def _of_one_seed(seeds: int) -> str:
    return f" in {in_seeds(1)}" if seeds == 1 else ""


def measure(records: Records) -> dict[Source, Constant]:
    """The constant in each norm from each kind of rounds."""
    d = records[0]["d"]
    return {
        (norm, source): _constant(records, reader, math.sqrt(d) if norm == IN_L1 else 1.0)
        for norm, key in ((IN_L1, "l1"), (IN_L2, "l2"))
        for source, reader in _readers(key).items()
    }


def _readers(key: str) -> dict[str, Callable[[Record], dict[int, float]]]:
    """What reads the norm ``key`` of each round of a record, by step."""
    return {
        RAW: lambda one: norm_findings.round_norms(one, key, corrected=False),
        CORRECTED: lambda one: norm_findings.round_norms(one, key, corrected=True),
        EXACT: lambda one: {int(step): exact[key] for step, exact in one["exact"].items() if step != "0"},
    }


def _constant(records: Records, read: Callable[[Record], dict[int, float]], scale: float) -> Constant:
    """As (A1) has it: the largest K^(1/4) times the running mean of the seeds' mean norm, over ``scale``."""
    by_seed = [read(one) for one in records]
    steps = sorted(by_seed[0])
    norms = torch.tensor([[one[step] for step in steps] for one in by_seed], dtype=torch.float64) / scale
    of_all = theory.sgd_rate_constant(norms, steps=steps)
    each = [theory.sgd_rate_constant(row, steps=steps).value for row in norms]
    return Constant(value=of_all.value, at_step=of_all.at_step, last_step=steps[-1], by_seed=each)


def _order(lion: Constant, sgd: Constant) -> str:
    """Where Lion's seeds are all below or above all of SGD's."""
    if max(lion.by_seed) < min(sgd.by_seed):
        return BELOW
    return ABOVE if min(lion.by_seed) > max(sgd.by_seed) else MIXED


def verdict(lion: dict[Source, Constant], sgd: dict[Source, Constant]) -> tuple[str, str]:
    """``holds``, ``does not hold`` or ``not established``, and why.

    It is established where the order is the same in both norms of Lion and from ``JUDGED`` rounds, and where no
    constant is decided by the last step: a longer run could have a larger one.
    """
    orders = {
        (norm, source): _order(lion[norm, source], sgd[IN_L2, source]) for norm, source in lion if source in JUDGED
    }
    listed = [
        f"{order} in {_named(norm, sources)}"
        for order in (BELOW, ABOVE, MIXED)
        for norm in (IN_L1, IN_L2)
        if (sources := [source for source in JUDGED if orders[norm, source] == order])
    ]
    late = [
        _named(name, sources)
        for name, own, norm in ((C_LION, lion, IN_L1), (C_SGD, sgd, IN_L2))
        if (sources := [source for source in JUDGED if own[norm, source].is_of_last_step])
    ]
    if late or len(set(orders.values())) > 1 or MIXED in orders.values():
        if late:
            listed.append(f"The last step decides {' and '.join(late)}: a longer run can have a larger one")
        return "not established", " ".join(f"{one}." for one in listed)
    return ("holds" if BELOW in orders.values() else "does not hold"), "The order is the same however it is measured."


def _named(what: str, sources: list[str]) -> str:
    """``what``, with the kinds of rounds if they are not all."""
    return what if len(sources) == len(JUDGED) else f"{what} ({', '.join(sources)})"


def _table(groups: dict[str, Records], found: dict[str, dict[Source, Constant]]) -> Table:
    head = ["constant of the seeds' mean (of each seed)", "norm", *SOURCES, "decided at step: all, corrected, exact"]
    table = [[*head, "the paper's", "learning rate", "rounds that converged"]]
    for name, of_one in groups.items():
        kind = "lion" if name == "lion_paper" else "sgd"
        for norm in (IN_L1, IN_L2) if kind == "lion" else (IN_L2,):
            each = [found[name][norm, source] for source in SOURCES]
            own = kind == "sgd" or norm == IN_L1
            cells = [*map(str, each), ", ".join(str(one.at_step) for one in each), PAPERS[kind] if own else "-"]
            table.append([NAMES[name], norm, *cells, listed_rates(of_one), "{} of {}".format(*converged(of_one))])
    return table
