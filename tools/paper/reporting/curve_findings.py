"""Figures 2 and 3 from the long runs: losses throughout training, r, and how often gradients were clipped."""

from collections.abc import Callable

from tools.paper.reporting import drawings, gaps
from tools.paper.reporting.findings import Finding, Judgement
from tools.paper.reporting.formulas import SHARE, SQRT_D
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import NAMES, SGDS, Record, StudyRuns, sentence, spread, steps_in_thousands
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS

LAST = f"{STEPS:,}"
FIXED, HELD_OUT, TRAINING = "loss on the fixed training split", "held-out loss", "mean training loss"
Loss = Callable[[Record, int], float]
# Each loss of a record at a step. The fixed split is measured without dropout, the training loss with it.
LOSSES: dict[str, Loss] = {
    FIXED: lambda one, step: one["exact"][str(step)]["loss"],
    HELD_OUT: lambda one, step: one["validation_loss"][str(step)],
    TRAINING: lambda one, step: one["training_loss"][str(step)],
}
ABOUT_INTERVALS = (
    "At step 0 the runs of a seed are the same. Intervals are Student's t at 95 % over the differences of each seed, "
    "not adjusted for the number of comparisons."
)
Gaps = dict[tuple[str, int], gaps.Interval]


def curves(runs: StudyRuns) -> Finding:
    """Losses, gaps between the optimizers at each checkpoint, exact r and clipping."""
    groups = runs.by_optimizer()
    others = [name for name in groups if name != "lion_paper"]
    compared = {name: found for name in others if (found := _gaps(runs, name))}
    sentences = [_sentence(runs, name, found) for name, found in compared.items()]
    sentences = sentences or ["Cannot be said: no seed has LION and another optimizer."]
    sentences += [ABOUT_INTERVALS] if compared else []
    sentences += [_about_r(runs), _about_clipping(runs)]
    return Finding(
        verdict=" ".join(sentences),
        made="",
        pictures={"bands are the seeds' smallest and largest": drawings.long_runs(groups, NAMES)},
        tables=[_losses_table(runs), *([_gaps_table(runs, compared)] if compared else []), _rounds_table(runs)],
        judgements=[*(_judgement(runs, name, found) for name, found in compared.items()), _r_judgement(runs)],
    )


def _gaps(runs: StudyRuns, other: str) -> Gaps:
    """``other``'s loss minus Lion's, for each loss and checkpoint; empty without a common seed."""
    each = {(loss, step): _gap(runs, other, loss, step) for loss in LOSSES for step in CHECKPOINTS}
    return {key: found for key, found in each.items() if found}


def _gap(runs: StudyRuns, other: str, loss: str, step: int) -> gaps.Interval | None:
    theirs, lion = (runs.by_seed(name, lambda one: LOSSES[loss](one, step)) for name in (other, "lion_paper"))
    by_seed = gaps.differences(theirs, lion)
    return gaps.interval(list(by_seed.values())) if by_seed else None


def _sentence(runs: StudyRuns, other: str, found: Gaps) -> str:
    """Whether Lion's losses are below those of ``other`` at every checkpoint."""
    word, side = gaps.judged(found.values())
    basis = runs.basis("lion_paper", other, seeds=found[FIXED, STEPS].seeds)
    said = f"{sentence(runs.mark + word)} {runs.where} ({basis}): {'' if side else 'not '}all three losses of LION are "
    said += f"{side or 'below'} those of {NAMES[other]} at each of {_checkpoints()}."
    said += "" if side else f" Not below, or not outside the 95 % interval: {_exceptions(found)}."
    lower, windows = _windows(runs, other)
    return f"{said} LION's mean training loss is below in every seed in {lower} of {windows} windows of 1,000 steps."


def _exceptions(found: Gaps) -> str:
    """The losses, and the checkpoints of each, where Lion is not below."""
    steps = {loss: [step for step in CHECKPOINTS if not found[loss, step].is_above_zero] for loss in LOSSES}
    return "; ".join(f"{loss} at {', '.join(steps_in_thousands(each))}" for loss, each in steps.items() if each)


def _windows(runs: StudyRuns, other: str) -> tuple[int, int]:
    """In how many windows of the logged training loss Lion's is the lower one in every common seed."""
    lion, theirs = (runs.by_seed(name, lambda one: one["training_loss"]) for name in ("lion_paper", other))
    seeds, steps = sorted(lion.keys() & theirs.keys()), list(next(iter(lion.values())))
    lower = sum(all(lion[seed][step] < theirs[seed][step] for seed in seeds) for step in steps)
    return lower, len(steps)


def _judgement(runs: StudyRuns, other: str, found: Gaps) -> Judgement:
    word, _ = gaps.judged(found.values())
    of_paper = "" if other in SGDS else " (not in the paper)"
    numbers = [f"{loss} at {LAST} steps: {found[loss, STEPS]}" for loss in (FIXED, HELD_OUT)]
    return Judgement(
        claim=f"LION's loss is below that of {NAMES[other]} throughout, {runs.where}{of_paper}",
        verdict=f"{runs.mark}{word}",
        basis=runs.basis("lion_paper", other, seeds=found[FIXED, STEPS].seeds),
        numbers=f"{NAMES[other]} minus LION, {'; '.join(numbers)}",
    )


def _checkpoints() -> str:
    return ", ".join(steps_in_thousands(CHECKPOINTS))


def _losses_table(runs: StudyRuns) -> Table:
    head = ["optimizer", "seeds", *(f"{loss}, {LAST} steps" for loss in LOSSES), f"{FIXED}, step 0"]
    table = [head]
    for name, of_one in runs.by_optimizer().items():
        cells = [spread(value(one, STEPS) for one in of_one) for value in LOSSES.values()]
        cells.append(spread(one["exact"]["0"]["loss"] for one in of_one))
        table.append([NAMES[name], str(len(of_one)), *cells])
    return table


def _gaps_table(runs: StudyRuns, compared: dict[str, Gaps]) -> Table:
    """Mean and 95 % interval of the differences of each seed; at step 0 only the fixed split is measured."""
    table = [["minus LION, by seed", "of", "seeds", *steps_in_thousands((0, *CHECKPOINTS))]]
    for name, found in compared.items():
        for loss in LOSSES:
            cells = [str(_gap(runs, name, loss, 0)) if loss == FIXED else "-"]
            cells += [str(found[loss, step]) for step in CHECKPOINTS]
            table.append([NAMES[name], loss, str(found[loss, STEPS].seeds), *cells])
    return table


def _rounds_table(runs: StudyRuns) -> Table:
    """What is measured of the gradients: exact r, how many rounds of 100 batches converged, and clipping."""
    ratios = [f"exact {SHARE}, step 0", _checkpoints()]
    table = [["optimizer", *ratios, "rounds that converged", "steps clipped", "mean gradient norm"]]
    for name, of_one in runs.by_optimizer().items():
        clipped = [one["clipped"] for one in of_one]
        cells = [spread(one["exact"]["0"]["ratio_over_sqrt_d"] for one in of_one), _exact_span(of_one)]
        cells.append("{} of {}".format(*converged(of_one)))
        cells += [_percent([one["share"] for one in clipped]), spread(one["mean_norm"] for one in clipped)]
        table.append([NAMES[name], *cells])
    return table


def converged(records: list[Record]) -> tuple[int, int]:
    """How many rounds of 100 batches converged, and how many there are."""
    marks = [bool(mark) for one in records for mark in one["rounds"]["converged"]]
    return sum(marks), len(marks)


def _exact_span(records: list[Record]) -> str:
    shares = [one["exact"][str(step)]["ratio_over_sqrt_d"] for one in records for step in CHECKPOINTS]
    return f"{min(shares):.3f} to {max(shares):.3f}"


def _about_r(runs: StudyRuns) -> str:
    first = runs.records[0]
    marked, of_all = converged(runs.records)
    return (
        f"r is judged only by exact rounds: {marked} of {of_all} rounds of {first['round_batches']} batches converged, "
        "the others measure noise as well. Exact rounds and their loss are over a fixed split of the training text "
        f"({first['tokens']['fixed']:,} tokens), without dropout. One size says nothing about {SQRT_D}."
    )


def _about_clipping(runs: StudyRuns) -> str:
    """Why clipping is not the same for SGD and Lion."""
    shape = runs.records[0]["settings"]
    shares = ", ".join(
        f"{NAMES[name]} {_percent([one['clipped']['share'] for one in of_one])}"
        for name, of_one in runs.by_optimizer().items()
    )
    return (
        f"With batches of {shape['global-batch-size']} sequences the gradient norm is above clip-grad "
        f"{shape['clip-grad']:g} in this part of the logged steps: {shares}. Clipping shortens SGD's step; LION's step "
        "depends on signs and hardly changes."
    )


def _percent(shares: list[float]) -> str:
    low, high = (f"{100 * end(shares):.0f}" for end in (min, max))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _r_judgement(runs: StudyRuns) -> Judgement:
    groups = runs.by_optimizer()
    spans = "; ".join(f"{NAMES[name]} {_exact_span(of_one)}" for name, of_one in groups.items())
    seeds = len({one["seed"] for one in runs.records})
    return Judgement(
        claim=f"$r$ stays of the order of {SQRT_D} throughout, {runs.where}",
        verdict=f"{runs.mark}one size cannot decide it",
        basis=f"{runs.basis(*groups, seeds=seeds)}, exact rounds",
        numbers=f"{SHARE} from 10k to 50k: {spans}",
    )
