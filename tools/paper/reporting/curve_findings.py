"""Figures 2 and 3 from the long runs: losses throughout training, r, and how often gradients were clipped."""

import math
from collections.abc import Callable

from megatron_lion.stats.convergence import MAX_CHANGE, MIN_SNR
from tools.paper.reporting import drawings, gaps
from tools.paper.reporting.findings import Finding, Judgement, sentence
from tools.paper.reporting.formulas import SHARE, SQRT_D
from tools.paper.reporting.layer_kinds import part_of, size_and_ratio, squared_l2
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import NAMES, SGDS, Record, StudyRuns, in_seeds, spread, steps_in_thousands
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS

LAST = f"{STEPS:,}"
FIXED, VALIDATION, TRAINING = "loss on the fixed training split", "validation loss", "mean training loss"
Loss = Callable[[Record, int], float]
# Each loss of a record at a step. The fixed split is measured without dropout, the training loss with it.
LOSSES: dict[str, Loss] = {
    FIXED: lambda one, step: one["exact"][str(step)]["loss"],
    VALIDATION: lambda one, step: one["validation_loss"][str(step)],
    TRAINING: lambda one, step: one["training_loss"][str(step)],
}
ABOUT_LOSSES = (
    "Runs of one seed start from the same weights. The mean training loss is that of the 1,000 steps before, with "
    "dropout; the validation loss is of 100 batches."
)
ABOUT_INTERVALS = (
    "Intervals are Student's t at 95 % over the differences of each seed, not adjusted for the number of comparisons."
)
# Nats on the fixed split of the long runs' text: tools.paper.studies.frequencies; long_runs.py --list shows it.
FREQUENCY_LOSS = {"gpt": 6.564}
CONVERGED = (
    f"signal-to-noise ratio at least {MIN_SNR:g}, and r of the first half of the batches within {100 * MAX_CHANGE:g} %"
)
Gaps = dict[tuple[str, int], gaps.Interval]


def curves(runs: StudyRuns) -> Finding:
    """Losses, gaps between the optimizers at each checkpoint, exact r and clipping."""
    groups = runs.by_optimizer()
    others = [name for name in groups if name != "lion_paper"]
    compared = {name: found for name in others if (found := _gaps(runs, name))}
    sentences = [_sentence(runs, name, found) for name, found in compared.items()]
    sentences = sentences or ["Cannot be said: no seed has LION and another optimizer."]
    sentences += [ABOUT_LOSSES] if compared else []
    sentences += [ABOUT_INTERVALS] if any(found[FIXED, STEPS].half_width for found in compared.values()) else []
    sentences += [_about_frequencies(runs)] if runs.model in FREQUENCY_LOSS else []
    sentences += [_about_r(runs), _about_clipping(runs)]
    return Finding(
        verdict=" ".join(sentences),
        made="",
        pictures={f"losses and r, {runs.where}": drawings.long_runs(groups, NAMES)},
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
    said = f"{sentence(runs.mark + word)} {runs.where} ({basis}): "
    if side:
        said += f"all three losses of LION are {side} those of {NAMES[other]} at each of {_checkpoints()}."
    else:
        said += f"LION's three losses at {_checkpoints()} are {gaps.counted_sides(found.values())} of the "
        said += f"comparisons with {NAMES[other]}. Not decided is an interval that includes 0: {_undecided(found)}."
    lower, higher, windows = _windows(runs, other)
    seeds = " in every seed" if found[FIXED, STEPS].seeds > 1 else ""
    counts = [f"{side}{seeds} in {count}" for side, count in (("below", lower), ("above", higher)) if count]
    counts = counts or [f"neither below nor above{seeds} in any"]
    return f"{said} LION's mean training loss is {' and '.join(counts)} of {windows} windows of 1,000 steps."


def _undecided(found: Gaps) -> str:
    """The losses, and the checkpoints of each, where Lion is neither below nor above."""
    both = {key for key, gap in found.items() if not (gap.is_above_zero or gap.is_below_zero)}
    steps = {loss: [step for step in CHECKPOINTS if (loss, step) in both] for loss in LOSSES}
    listed = [f"{loss} at {', '.join(steps_in_thousands(each))}" for loss, each in steps.items() if each]
    return "; ".join(listed) or "none"


def _windows(runs: StudyRuns, other: str) -> tuple[int, int, int]:
    """In how many windows of the logged training loss Lion's is the lower and the higher in every common seed."""
    lion, theirs = (runs.by_seed(name, lambda one: one["training_loss"]) for name in ("lion_paper", other))
    seeds, steps = sorted(lion.keys() & theirs.keys()), list(next(iter(lion.values())))
    lower = sum(all(lion[seed][step] < theirs[seed][step] for seed in seeds) for step in steps)
    higher = sum(all(lion[seed][step] > theirs[seed][step] for seed in seeds) for step in steps)
    return lower, higher, len(steps)


def _judgement(runs: StudyRuns, other: str, found: Gaps) -> Judgement:
    word, side = gaps.judged(found.values())
    word += "" if side else f": LION is {gaps.counted_sides(found.values())}"
    of_paper = "" if other in SGDS else " (not in the paper)"
    numbers = [f"{loss} at {LAST} steps: {found[loss, STEPS]}" for loss in (FIXED, VALIDATION)]
    baseline = _about_baseline(runs, other)
    numbers += [baseline] if baseline else []
    return Judgement(
        claim=f"LION's loss is below that of {NAMES[other]} throughout, {runs.where}{of_paper}",
        verdict=f"{runs.mark}{word}",
        basis=runs.basis("lion_paper", other, seeds=found[FIXED, STEPS].seeds),
        numbers=f"{NAMES[other]} minus LION, {'; '.join(numbers)}",
        plain=_plain(runs, other, found[FIXED, STEPS], side, baseline),
    )


def _plain(runs: StudyRuns, other: str, end: gaps.Interval, side: str, baseline: str) -> str:
    """The losses at the last step in words, of comparisons over several seeds that have one side throughout."""
    if not side or end.half_width is None or other == "sgd_paper_no_momentum":
        return ""
    return (
        f"{sentence(runs.where)} LION's {FIXED} ends {abs(end.mean):.3f} (+- {end.half_width:.3f}) {side} that of "
        f"{NAMES[other]} ({in_seeds(end.seeds)})." + (f" {baseline}." if baseline else "")
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
    table = [["optimizer minus LION", "loss", "seeds", *steps_in_thousands((0, *CHECKPOINTS))]]
    for name, found in compared.items():
        for loss in LOSSES:
            cells = [str(_gap(runs, name, loss, 0)) if loss == FIXED else "-"]
            cells += [str(found[loss, step]) for step in CHECKPOINTS]
            table.append([NAMES[name], loss, str(found[loss, STEPS].seeds), *cells])
    return table


def _rounds_table(runs: StudyRuns) -> Table:
    """What is measured of the gradients: exact r, how many rounds of 100 batches converged, and clipping."""
    ratios = [f"exact {SHARE}, step 0", _checkpoints()]
    head = ["optimizer", *ratios, f"{SHARE} without norm layers", "norm layers of the squared $\\ell_2$ norm"]
    table = [[*head, "rounds that converged", "steps clipped", "mean gradient norm"]]
    for name, of_one in runs.by_optimizer().items():
        clipped = [one["clipped"] for one in of_one]
        cells = [
            spread(one["exact"]["0"]["ratio_over_sqrt_d"] for one in of_one),
            _exact_span(of_one),
            *_norm_layers(of_one),
        ]
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


def _norm_layers(records: list[Record]) -> list[str]:
    """r / sqrt(d) without the norm layers, and their part of ||grad f||_2^2, from 10k on: few weights can decide r."""
    each = [one["exact"][str(step)]["kinds"] for one in records for step in CHECKPOINTS]
    without = [size_and_ratio([kind for name, kind in kinds.items() if name != "norm"]) for kinds in each]
    shares = [r / math.sqrt(d) for d, r in without]
    return [f"{min(shares):.3f} to {max(shares):.3f}", _percent([part_of(kinds, "norm", squared_l2) for kinds in each])]


def _is_at_baseline(runs: StudyRuns, optimizer: str) -> bool:
    """Whether no seed ends below the loss of a model that knows only the token frequencies."""
    losses = runs.by_seed(optimizer, lambda one: LOSSES[FIXED](one, STEPS)).values()
    return min(losses) >= FREQUENCY_LOSS.get(runs.model, math.inf)


def _about_baseline(runs: StudyRuns, optimizer: str) -> str:
    """That ``optimizer`` did not beat the token frequencies; empty if it did."""
    if not _is_at_baseline(runs, optimizer):
        return ""
    return f"{NAMES[optimizer]} does not beat the token-frequency baseline ({FREQUENCY_LOSS[runs.model]})"


def _about_frequencies(runs: StudyRuns) -> str:
    """The loss of a model that knows only the token frequencies, and the optimizers that do not beat it."""
    said = f"The token-frequency baseline, which ignores the context, has a {FIXED} of {FREQUENCY_LOSS[runs.model]}. "
    worse = [NAMES[name] for name in runs.by_optimizer() if _is_at_baseline(runs, name)]
    return said + (f"Not below it at {LAST} steps: {', '.join(worse)}." if worse else "All optimizers are below it.")


def _about_r(runs: StudyRuns) -> str:
    first = runs.records[0]
    marked, of_all = converged(runs.records)
    return (
        f"r is judged only by exact rounds: {marked} of {of_all} rounds of {first['round_batches']} batches converged "
        f"({CONVERGED}), the others measure noise as well. Exact rounds and their loss are over a fixed split of the "
        f"training text ({first['exact']['0']['tokens']:,} tokens), without dropout. One size says nothing about "
        f"{SQRT_D}."
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
