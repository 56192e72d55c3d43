"""r against d of the long runs of several sizes: one point a run, for each optimizer, step and set of parameters."""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from tools.paper import theory
from tools.paper.reporting.layer_kinds import size_and_ratio
from tools.paper.reporting.study_runs import NAMES as OPTIMIZER_NAMES
from tools.paper.reporting.study_runs import Records

START = "start"
NAMES = {START: "before the first step"} | OPTIMIZER_NAMES
WHOLE, WITHOUT, EMBEDDING = "all parameters", "without the embedding", "embedding"
FEWEST = 3  # sizes of a fit


class Arm(NamedTuple):
    """Runs that differ in size and seed only."""

    optimizer: str
    rate: float | None = None
    """where the optimizer has several"""

    @property
    def name(self) -> str:
        return NAMES[self.optimizer] + (f" at {self.rate:g}" if self.rate else "")


Key = tuple[Arm, int, str]  # arm, step, set of parameters


@dataclass(frozen=True, kw_only=True)
class Points:
    """r of each run against d, for one arm, step and set of parameters."""

    d: list[int]
    r: list[float]
    seeds: list[int]

    @property
    def fit(self) -> theory.PowerLaw | None:
        """The power law through the seeds' geometric mean of r at each size; None for too few sizes.

        Runs of one size share a deviation from the line, so they are not independent points: a fit through all runs
        would have too narrow an interval.
        """
        means = self.means
        return theory.fit_power_law(list(means), list(means.values())) if len(means) >= FEWEST else None

    @property
    def means(self) -> dict[int, float]:
        """The seeds' geometric mean of r by d, the smallest d first."""
        of_size: defaultdict[int, list[float]] = defaultdict(list)
        for d, r in sorted(zip(self.d, self.r, strict=True)):
            of_size[d].append(r)
        return {d: statistics.geometric_mean(each) for d, each in of_size.items()}

    @property
    def end_slopes(self) -> list[str]:
        """The exponent between the two smallest sizes, and between the two largest."""
        points = [(math.log(d), math.log(r)) for d, r in self.means.items()]
        pairs = (points[:2], points[-2:]) if len(points) > 1 else ()
        return [f"{(last[1] - first[1]) / (last[0] - first[0]):.2f}" for first, last in pairs] or ["-", "-"]

    @property
    def seed_slopes(self) -> list[float]:
        """The exponent of each seed, over the sizes that all seeds have; empty with one seed or too few sizes."""
        by_seed: defaultdict[int, dict[int, float]] = defaultdict(dict)
        for d, r, seed in zip(self.d, self.r, self.seeds, strict=True):
            by_seed[seed][d] = r
        common = sorted(set.intersection(*map(set, by_seed.values())))
        if len(by_seed) < 2 or len(common) < FEWEST:
            return []
        return [theory.fit_power_law(common, [one[d] for d in common]).exponent for one in by_seed.values()]

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
    found: dict[Key, dict[tuple[int, int, Arm], tuple[int, float, int]]] = {}
    for record, own in zip(records, arms, strict=True):
        for step, exact in record["exact"].items():
            arm = Arm(START) if step == "0" else own
            run = (record["d"], record["seed"], arm)
            for name, (d, r) in _ratios(exact["kinds"]).items():
                found.setdefault((arm, int(step), name), {})[run] = (d, r, record["seed"])
    ordered = sorted(found.items(), key=_order)
    columns = {key: tuple(map(list, zip(*each.values(), strict=True))) for key, each in ordered}
    return {key: Points(d=d, r=r, seeds=seeds) for key, (d, r, seeds) in columns.items()}


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
    found = {
        name: size_and_ratio([kinds[kind] for kind in members])
        for name, members in (sets | {kind: [kind] for kind in kinds}).items()
    }
    return {name: (d, r) for name, (d, r) in found.items() if math.isfinite(r)}


def _order(entry: tuple[Key, object]) -> tuple[int, float, int, bool, bool, str]:
    (arm, step, name), _ = entry
    return list(NAMES).index(arm.optimizer), -(arm.rate or 0.0), step, name != WHOLE, name != WITHOUT, name
