"""What the long runs of several sizes left: the exponent of r against d, with and without the embedding."""

from tools.paper import theory
from tools.paper.reporting import size_drawing
from tools.paper.reporting.findings import Finding, Judgement, counted, sentence
from tools.paper.reporting.formulas import SHARE, SQRT_D
from tools.paper.reporting.layer_kinds import part_of, squared_l2
from tools.paper.reporting.paper import Table
from tools.paper.reporting.size_points import EMBEDDING, FEWEST, NAMES, START, WHOLE, WITHOUT, Arm, Key, Points, points
from tools.paper.reporting.study_runs import Record, Records, StudyRuns, in_seeds, span
from tools.paper.studies.long_runs import SHAPE

WIDEST = 0.15  # of an interval that decides something
FALL = 0.1  # nats that the loss of a run falls at least
# Where an exponent is, by its interval.
STATES = INSIDE, ABOVE, BELOW, UNDECIDED = "around 0.5", "above 0.5", "below 0.5", "undecided"
ABOUT = (
    f"Around 0.5: the interval includes 0.5. Undecided: the interval includes 0.5 and is wider than {WIDEST}. "
    r"Because $r \le \sqrt{d}$, an exponent above 0.5 cannot continue for all $d$. It is consistent with "
    r"$r \ge c \sqrt{d}$. An exponent below 0.5 contradicts that bound if it continues for larger $d$. Each size is "
    "the geometric mean of its seeds. An interval measures the scatter of the sizes around the line, not of the seeds. "
    "The slopes between the two smallest and between the two largest sizes show how straight the line is. Compare only "
    "fits of the same number of sizes."
)


def has_learned(record: Record) -> bool:
    """Whether the exact training loss fell by ``FALL`` from the start to the last measured step."""
    losses = {int(step): exact["loss"] for step, exact in record["exact"].items()}
    return bool(losses[0] - losses[max(losses)] >= FALL)


def decided(fit: theory.PowerLaw) -> str:
    """On which side of 0.5 the interval is, or whether it includes 0.5 and is too wide to say."""
    if fit.low > 0.5:
        return ABOVE
    if fit.high < 0.5:
        return BELOW
    return UNDECIDED if fit.high - fit.low > WIDEST else INSIDE


def exponents(runs: StudyRuns) -> Finding:
    """Section 5: exponents with intervals, a verdict for each step, and r / sqrt(d) by kind of layer."""
    kept = [one for one in runs.records if has_learned(one)]
    left_out = [one["name"] for one in runs.records if not has_learned(one)]
    missing = [f"left out, because the training loss did not fall by {FALL}: {', '.join(left_out)}"] if left_out else []
    if not kept:
        return Finding(verdict="Cannot be said: the loss of no run fell.", made="", missing=missing)
    found = points(kept)
    fits = {key: fit for key, each in found.items() if (fit := each.fit)}
    steps = sorted({step for _, step, _ in found})
    said = " ".join(f"{sentence(_when(step))}. {_sides(fits, step)}." for step in steps)
    of_rates = f"Every width has the rates that are best at width {SHAPE['hidden-size']}"
    of_rates += ", and LION a tenth of its rate as well." if any(arm.rate for arm, _, _ in found) else "."
    return Finding(
        verdict=f"{sentence(runs.mark + 'exponents')} of r against d, by the position of their intervals. "
        f"{said} {ABOUT} {_about_seeds(found)}"
        f"{_about_embedding(kept)}{_without_embedding(fits)} {of_rates}",
        made="",
        tables=[_exponents_table(found), _layers_table(found)],
        pictures={
            "r against d, one point a run; solid or dashed: the fit; dotted: sqrt(d) through its middle": (
                size_drawing.draw(found, (WHOLE, WITHOUT))
            )
        },
        missing=missing,
        judgements=[_judgement(runs, step, found, fits) for step in steps],
    )


def _when(step: int) -> str:
    return f"step {step:,}" if step else NAMES[START]


def _sides(fits: dict[Key, theory.PowerLaw], step: int) -> str:
    """The optimizers by the side of 0.5 that their exponents are on, for all parameters and without the embedding."""
    parts = []
    for name in (WHOLE, WITHOUT):
        sides = {arm: decided(fit) for (arm, at, of), fit in fits.items() if (at, of) == (step, name)}
        arms = {state: [arm for arm, side in sides.items() if side == state] for state in STATES}
        said = [f"{_listed(of_state)}{state}" for state, of_state in arms.items() if of_state]
        parts += [f"{name}: {'; '.join(said)}"] if said else []
    return ". ".join(map(sentence, parts)) or f"fewer than {FEWEST} sizes"


def _listed(arms: list[Arm]) -> str:
    """The arms before their side; nothing for the only one at the start."""
    return "" if arms == [Arm(START)] else f"{', '.join(arm.name for arm in arms)} "


def _exponents_table(found: dict[Key, Points]) -> Table:
    head = ["optimizer", "step", "parameters", "sizes", "runs", "exponent [95 %]", "verdict"]
    table = [[*head, "two smallest", "two largest", SHARE]]
    for (arm, step, name), each in found.items():
        if name in (WHOLE, WITHOUT):
            fit = each.fit
            cells = [str(fit), decided(fit)] if fit else ["-", "-"]
            counts = [str(len(each.means)), str(len(each.d))]
            table.append([arm.name, str(step), name, *counts, *cells, *each.end_slopes, each.span])
    return table


def _layers_table(found: dict[Key, Points]) -> Table:
    """r / sqrt(d) and the exponent of each kind of layer, against that layer's own d."""
    table = [["optimizer", "step", "kind of layer", SHARE, "exponent [95 %]"]]
    for (arm, step, name), each in found.items():
        if name not in (WHOLE, WITHOUT):
            table.append([arm.name, str(step), name, each.span, str(each.fit or "-")])
    return table


def _about_seeds(found: dict[Key, Points]) -> str:
    """How much the exponents of single seeds differ, where there are several."""
    ranges = [
        max(slopes) - min(slopes)
        for (_, _, name), each in found.items()
        if name in (WHOLE, WITHOUT) and (slopes := each.seed_slopes)
    ]
    if not ranges:
        return "All fits have one seed. "
    return (
        f"Where there are several seeds, their exponents differ by up to {max(ranges):.2f}. The others have one seed. "
    )


def _about_embedding(records: Records) -> str:
    """How much of the parameters and of the gradient is the embedding's."""
    each = [exact["kinds"] for record in records for exact in record["exact"].values()]
    of_d = [part_of(kinds, EMBEDDING, lambda kind: kind["d"]) for kinds in each]
    of_l2 = [part_of(kinds, EMBEDDING, squared_l2) for kinds in each]
    parts = [f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %" for shares in (of_d, of_l2)]
    return (
        f"The embedding, of words and positions, is {parts[0]} of the parameters and {parts[1]} of the squared "
        "l2 norm of the gradient."
    )


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


def _judgement(runs: StudyRuns, step: int, found: dict[Key, Points], fits: dict[Key, theory.PowerLaw]) -> Judgement:
    """Of all optimizers at one step."""
    sides = _sides(fits, step)
    is_main = bool(fits) and step == max(at for _, at, _ in found)
    own = [each for (_, at, name), each in found.items() if (at, name) == (step, WHOLE)]
    every = [d for each in own for d in each.d]
    seeds = in_seeds(len({seed for each in own for seed in each.seeds}))
    of_sizes = f"{span(len(each.means) for each in own)} sizes ({counted(len(every), 'run')}, {seeds})"
    listed = [
        f"{name}: " + ", ".join(f"{arm.name} {fit}" for (arm, at, of), fit in fits.items() if (at, of) == (step, name))
        for name in (WHOLE, WITHOUT)
    ]
    return Judgement(
        claim=f"$r$ grows as {SQRT_D}: exponent 0.5, {_when(step)}",
        verdict=f"{runs.mark}{sides}",
        basis=f"{runs.model.upper()}s of {of_sizes}, d = {span(every)}, exact rounds",
        numbers="; ".join(listed) if fits else "-",
        plain=f"Exponent of $r$ against $d$ ({_when(step)}, {SQRT_D} has 0.5). {sides}." if is_main else "",
    )
