"""What the long runs of several sizes left: the exponent of r against d, with and without the embedding."""

import math
from typing import Any

from tools.paper import theory
from tools.paper.reporting.findings import Finding
from tools.paper.reporting.paper import Table
from tools.paper.studies.plans import LARGE, RATES, WIDTHS

Records = list[dict[str, Any]]
NAMES = {"lion_paper": "LION", "sgd_paper": "SGD, momentum 0.9", "adamw": "AdamW", "start": "before the first step"}
WHOLE, WITHOUT = "all parameters", "without the embedding"
WIDEST = 0.15  # of an interval that says something


def points(records: Records) -> dict[tuple[str, int, str], dict[int, float]]:
    """r by d, for each optimizer, step and set of parameters, from exact rounds.

    The sets are all parameters, all but the embedding, and each kind of layer. d counts the parameters of the set.
    Before the first step the optimizers do not differ: these points are of ``start``.
    """
    found: dict[tuple[str, int, str], dict[int, float]] = {}
    for record in records:
        for step, exact in record["exact"].items():
            optimizer = "start" if step == "0" else record["optimizer"]
            kinds = exact["kinds"]
            sets = {WHOLE: list(kinds), WITHOUT: [kind for kind in kinds if kind != "embedding"]}
            for name, members in (sets | {kind: [kind] for kind in kinds}).items():
                d = sum(kinds[kind]["d"] for kind in members)
                l1 = sum(kinds[kind]["l1"] for kind in members)
                l2 = math.sqrt(sum(kinds[kind]["l2"] ** 2 for kind in members))
                if l2 > 0.0:
                    found.setdefault((optimizer, int(step), name), {})[d] = l1 / l2
    return found


def exponents(records: Records, where: str) -> Finding:
    """Section 5: exponents with intervals, and r / sqrt(d) by kind of layer."""
    found = points(records)
    fits = {key: theory.fit_power_law(list(by_d), list(by_d.values())) for key, by_d in found.items() if len(by_d) > 2}
    table: Table = [["optimizer", "step", "parameters", "sizes", "exponent [95 %]", "0.5 inside", "r / sqrt(d)"]]
    for (optimizer, step, name), by_d in sorted(found.items(), key=_order):
        shares = [r / math.sqrt(d) for d, r in by_d.items()]
        span = f"{min(shares):.3f} to {max(shares):.3f}"
        fit = fits.get((optimizer, step, name))
        interval = f"{fit.exponent:.3f} [{fit.low:.3f}, {fit.high:.3f}]" if fit else "-"
        inside = ("yes" if fit.low <= 0.5 <= fit.high else "no") if fit else "-"
        table.append([NAMES[optimizer], str(step), name, str(len(by_d)), interval, inside, span])
    wide = sum(fit.high - fit.low > WIDEST for fit in fits.values())
    whole = [fit for (_, _, name), fit in fits.items() if name == WHOLE]
    without = [fit for (_, _, name), fit in fits.items() if name == WITHOUT]
    return Finding(
        verdict=f"Exponent of all parameters: {_span(whole)}; without the embedding: {_span(without)}. {wide} of "
        f"{len(fits)} intervals are wider than {WIDEST}.",
        made="",
        tables=[table],
    )


def planned() -> int:
    """Runs that the study of sizes has."""
    large = sum(d > LARGE for d in WIDTHS.values())
    return len(RATES) * (len(WIDTHS) - large) + large


def _order(entry: tuple[tuple[str, int, str], Any]) -> tuple[int, int, bool, bool, str]:
    (optimizer, step, name), _ = entry
    return list(NAMES).index(optimizer), step, name != WHOLE, name != WITHOUT, name


def _span(fits: list[theory.PowerLaw]) -> str:
    if not fits:
        return "not enough sizes"
    exponents = [fit.exponent for fit in fits]
    half = sum(fit.low <= 0.5 <= fit.high for fit in fits)
    return f"{min(exponents):.3f} to {max(exponents):.3f}, 0.5 inside {half} of {len(fits)} intervals"
