"""What the long runs of several sizes left: the exponent of r against d, with and without the embedding."""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from tools.paper import theory
from tools.paper.reporting import size_drawing
from tools.paper.reporting.findings import Finding, Judgement, counted
from tools.paper.reporting.formulas import SHARE, SQRT_D
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import NAMES as OPTIMIZER_NAMES
from tools.paper.reporting.study_runs import Record, Records, StudyRuns, sentence, span
from tools.paper.studies.long_runs import SHAPE

START = "start"
NAMES = {START: "before the first step"} | OPTIMIZER_NAMES
WHOLE, WITHOUT, EMBEDDING = "all parameters", "without the embedding", "embedding"
WIDEST = 0.15  # of an interval that decides something
FALL = 0.1  # nats that the loss of a run falls at least
FEWEST = 3  # sizes of a fit
INSIDE, OUTSIDE, UNDECIDED = "inside", "outside", "undecided"


class Arm(NamedTuple):
    """Runs that differ in size and seed only."""

    optimizer: str
    rate: float | None = None
    """where the optimizer has several"""

    @property
    def name(self) -> str:
        return NAMES[self.optimizer] + (f", lr {self.rate:g}" if self.rate else "")


Key = tuple[Arm, int, str]  # arm, step, set of parameters


@dataclass(frozen=True, kw_only=True)
class Points:
    """r of each run against d, for one arm, step and set of parameters."""

    d: list[int]
    r: list[float]

    @property
    def fit(self) -> theory.PowerLaw | None:
        """The power law through the seeds' geometric mean of r at each size; None for too few sizes.

        Runs of one size may lie on the same side of the line. As points of their own they would not scatter
        independently, and the interval would be too narrow.
        """
        of_size: defaultdict[int, list[float]] = defaultdict(list)
        for d, r in zip(self.d, self.r, strict=True):
            of_size[d].append(r)
        means = [statistics.geometric_mean(each) for each in of_size.values()]
        return theory.fit_power_law(list(of_size), means) if len(of_size) >= FEWEST else None

    @property
    def span(self) -> str:
        """The smallest and the largest r / sqrt(d)."""
        shares = [r / math.sqrt(d) for d, r in zip(self.d, self.r, strict=True)]
        return f"{min(shares):.3f} to {max(shares):.3f}"


def points(records: Records) -> dict[Key, Points]:
    """One point a run from exact rounds, for each arm, step and set of parameters, in the order of the tables.

    The sets are all parameters, all but the embedding, and each kind of layer. d counts the parameters of the set.
    Before the first step the runs of one size and seed are the same for all arms: they are one point of ``start``.
    """
    arms = _arms_of(records)
    found: dict[Key, dict[tuple[int, int, Arm], tuple[int, float]]] = {}
    for record, own in zip(records, arms, strict=True):
        for step, exact in record["exact"].items():
            arm = Arm(START) if step == "0" else own
            run = (record["d"], record["seed"], arm)
            for name, (d, r) in _ratios(exact["kinds"]).items():
                found.setdefault((arm, int(step), name), {})[run] = (d, r)
    ordered = sorted(found.items(), key=_order)
    return {key: Points(d=[d for d, _ in each.values()], r=[r for _, r in each.values()]) for key, each in ordered}


def _arms_of(records: Records) -> list[Arm]:
    """The arm of each record."""
    rates: defaultdict[str, set[float]] = defaultdict(set)
    for one in records:
        rates[one["optimizer"]].add(one["settings"]["lr"])
    return [
        Arm(one["optimizer"], one["settings"]["lr"] if len(rates[one["optimizer"]]) > 1 else None) for one in records
    ]


def _ratios(kinds: dict[str, dict[str, float]]) -> dict[str, tuple[int, float]]:
    """d and r of each set of parameters with a gradient."""
    sets = {WHOLE: list(kinds), WITHOUT: [kind for kind in kinds if kind != EMBEDDING]}
    found = {}
    for name, members in (sets | {kind: [kind] for kind in kinds}).items():
        l2 = math.sqrt(sum(kinds[kind]["l2"] ** 2 for kind in members))
        if l2 > 0.0:
            d = int(sum(kinds[kind]["d"] for kind in members))
            found[name] = (d, sum(kinds[kind]["l1"] for kind in members) / l2)
    return found


def _order(entry: tuple[Key, object]) -> tuple[int, float, int, bool, bool, str]:
    (arm, step, name), _ = entry
    return list(NAMES).index(arm.optimizer), -(arm.rate or 0.0), step, name != WHOLE, name != WITHOUT, name


def has_learned(record: Record) -> bool:
    """Whether the exact training loss fell by ``FALL`` from the start to the last measured step."""
    losses = {int(step): exact["loss"] for step, exact in record["exact"].items()}
    return bool(losses[0] - losses[max(losses)] >= FALL)


def decided(fit: theory.PowerLaw) -> str:
    """Whether 0.5 is inside the interval, or the interval is too wide to say."""
    if fit.high - fit.low > WIDEST:
        return UNDECIDED
    return INSIDE if fit.low <= 0.5 <= fit.high else OUTSIDE


def exponents(runs: StudyRuns) -> Finding:
    """Section 5: exponents with intervals, a verdict for each optimizer and step, and r / sqrt(d) by kind of layer."""
    kept = [one for one in runs.records if has_learned(one)]
    left_out = [one["name"] for one in runs.records if not has_learned(one)]
    missing = [f"left out, because the training loss did not fall by {FALL}: {', '.join(left_out)}"] if left_out else []
    if not kept:
        return Finding(verdict="Cannot be said: the loss of no run fell.", made="", missing=missing)
    found = points(kept)
    keys = list(dict.fromkeys((arm, step) for arm, step, _ in found))
    fits = {key: fit for key, each in found.items() if (fit := each.fit)}
    said = "; ".join(f"{arm.name}{_at(step)}: {_in_words(fits, arm, step)}" for arm, step in keys)
    of_rates = f"Every width has the rates that are best at width {SHAPE['hidden-size']}"
    of_rates += ", and LION a tenth of its rate as well." if any(arm.rate for arm, _ in keys) else "."
    return Finding(
        verdict=f"{sentence(runs.mark + 'exponents')} of r against d: {said}. Undecided is an interval wider than "
        f"{WIDEST}. {_about_embedding(kept)}{_without_embedding(fits)} {of_rates}",
        made="",
        tables=[_exponents_table(found), _layers_table(found)],
        pictures={"r against d, one point a run; lines are the fits": size_drawing.draw(found, (WHOLE, WITHOUT))},
        missing=missing,
        judgements=[_judgement(runs, key, found[*key, WHOLE], fits) for key in keys],
    )


def _at(step: int) -> str:
    return f" at step {step:,}" if step else ""


def _in_words(fits: dict[Key, theory.PowerLaw], arm: Arm, step: int) -> str:
    """The verdict on all parameters, and the exponent without the embedding."""
    whole, without = (fits.get((arm, step, name)) for name in (WHOLE, WITHOUT))
    if whole is None:
        return f"fewer than {FEWEST} sizes"
    said = f"{WHOLE} {_verdict(whole)}"
    return f"{said}, {WITHOUT} {_verdict(without)}" if without else said


def _verdict(fit: theory.PowerLaw) -> str:
    """``0.483 [0.450, 0.520] (0.5 inside)``."""
    state = decided(fit)
    words = state if state == UNDECIDED else f"0.5 {state}"
    return f"{fit} ({words})"


def _exponents_table(found: dict[Key, Points]) -> Table:
    table = [["optimizer", "step", "parameters", "sizes", "runs", "exponent [95 %]", "0.5 inside", SHARE]]
    for (arm, step, name), each in found.items():
        if name in (WHOLE, WITHOUT):
            fit = each.fit
            cells = [str(fit), _yes(fit)] if fit else ["-", "-"]
            counts = [str(len(set(each.d))), str(len(each.d))]
            table.append([arm.name, str(step), name, *counts, *cells, each.span])
    return table


def _yes(fit: theory.PowerLaw) -> str:
    return {INSIDE: "yes", OUTSIDE: "no", UNDECIDED: UNDECIDED}[decided(fit)]


def _layers_table(found: dict[Key, Points]) -> Table:
    """r / sqrt(d) and the exponent of each kind of layer, against that layer's own d."""
    table = [["optimizer", "step", "kind of layer", SHARE, "exponent [95 %]"]]
    for (arm, step, name), each in found.items():
        if name not in (WHOLE, WITHOUT):
            table.append([arm.name, str(step), name, each.span, str(each.fit or "-")])
    return table


def _about_embedding(records: Records) -> str:
    """How much of the parameters and of the gradient is the embedding's."""
    of_d, of_l2 = [], []
    for record in records:
        for exact in record["exact"].values():
            kinds = exact["kinds"]
            own = kinds.get(EMBEDDING, {"d": 0, "l2": 0.0})
            of_d.append(own["d"] / sum(kind["d"] for kind in kinds.values()))
            of_l2.append(own["l2"] ** 2 / sum(kind["l2"] ** 2 for kind in kinds.values()))
    parts = [f"{min(shares):.0%} to {max(shares):.0%}" for shares in (of_d, of_l2)]
    return f"The embedding is {parts[0]} of the parameters and {parts[1]} of the squared l2 norm of the gradient."


def _without_embedding(fits: dict[Key, theory.PowerLaw]) -> str:
    """How much the exponent changes where the embedding is left out."""
    changes = [
        fits[arm, step, WITHOUT].exponent - fit.exponent
        for (arm, step, name), fit in fits.items()
        if name == WHOLE and (arm, step, WITHOUT) in fits
    ]
    if not changes:
        return ""
    return f" Leaving it out changes the exponent by {min(changes):+.3f} to {max(changes):+.3f}."


def _judgement(runs: StudyRuns, key: tuple[Arm, int], each: Points, fits: dict[Key, theory.PowerLaw]) -> Judgement:
    arm, step = key
    whole = fits.get((arm, step, WHOLE))
    counts = f"{counted(len(set(each.d)), 'size')} ({counted(len(each.d), 'run')})"
    of_sizes = f"{runs.model.upper()}s of {counts}, d = {span(each.d)}"
    basis = f"{of_sizes}, {arm.name}{_at(step)}, exact rounds"
    state = f"fewer than {FEWEST} sizes" if whole is None else decided(whole)
    return Judgement(
        claim=f"$r$ grows as {SQRT_D}: exponent 0.5",
        verdict=f"{runs.mark}{'0.5 ' if state in (INSIDE, OUTSIDE) else ''}{state}"
        + (f" [{whole.low:.3f}, {whole.high:.3f}]" if whole else ""),
        basis=basis,
        numbers=_in_words(fits, arm, step),
    )
