"""The rate search: each optimizer's validation loss by learning rate."""

import math

from tools.paper.reporting.findings import Finding, Judgement, sentence
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import NAMES, StudyRuns, in_seeds, span_of
from tools.paper.studies import plans

ByRate = dict[float, float]


def search(runs: StudyRuns) -> Finding:
    """Validation loss at the last step for each optimizer and rate, with the best one."""
    losses = {name: dict(sorted(found.items())) for name, found in plans.search_losses(runs.records).items() if found}
    uniform = math.log(runs.records[0]["settings"]["vocab-size"])
    best = {name: rate for name, by_rate in losses.items() if (rate := _best(by_rate, uniform)) is not None}
    said = [_sentence(name, by_rate, best.get(name)) for name, by_rate in losses.items()]
    return Finding(
        verdict=f"{sentence(runs.mark + 'best')} learning rates by validation loss (100 batches) at step "
        f"{span_of(runs.records, 'steps')}: {'; '.join(said)}. Runs worse than "
        f"a uniform prediction (ln {runs.records[0]['settings']['vocab-size']} = "
        f"{uniform:.2f}) are marked as diverged.",
        made="",
        tables=[_table(losses, best, uniform)],
        judgements=_judgements(runs, losses, best),
    )


def _best(by_rate: ByRate, uniform: float) -> float | None:
    """The rate with the lowest loss; None where all diverged."""
    rate = min(by_rate, key=by_rate.__getitem__)
    return rate if by_rate[rate] < uniform else None


def _sentence(name: str, by_rate: ByRate, best: float | None) -> str:
    if best is None:
        return f"{NAMES[name]}: every rate diverged"
    return f"{NAMES[name]} {best:g} ({by_rate[best]:.3f}), {_where(by_rate, best)}"


def _where(by_rate: ByRate, best: float) -> str:
    """Whether the best rate is at an edge of those that were tried."""
    if len(by_rate) == 1:
        return "the only rate so far"
    if best == max(by_rate):
        return "the largest rate tried: a larger one may be better"
    return "the smallest rate tried: a smaller one may be better" if best == min(by_rate) else "not at an edge"


def _table(losses: dict[str, ByRate], best: dict[str, float], uniform: float) -> Table:
    table = [["optimizer", "learning rate", "validation loss", ""]]
    for name, by_rate in losses.items():
        for rate, loss in by_rate.items():
            mark = "diverged" if loss >= uniform else "best" if rate == best.get(name) else ""
            if mark == "best" and rate in (min(by_rate), max(by_rate)):
                mark = "best, at an edge"
            table.append([NAMES[name], f"{rate:g}", f"{loss:.3f}" if math.isfinite(loss) else "-", mark])
    return table


def _judgements(runs: StudyRuns, losses: dict[str, ByRate], best: dict[str, float]) -> list[Judgement]:
    """Table A2's claim, for language."""
    if not {"lion_paper", "sgd_paper"} <= best.keys():
        return []
    lion, sgd = best["lion_paper"], best["sgd_paper"]
    numbers = "; ".join(f"{NAMES[name]} {rate:g} ({losses[name][rate]:.3f})" for name, rate in best.items())
    seeds = in_seeds(len({one["seed"] for one in runs.records}))
    return [
        Judgement(
            claim="LION's best learning rate is at most SGD's (not in the paper's text; so in 5 of 6 of its table A2)",
            verdict=f"{runs.mark}{'seen' if lion <= sgd else 'not seen'} in {seeds}",
            basis=runs.basis("lion_paper", "sgd_paper", seeds=len({one["seed"] for one in runs.records})),
            numbers=f"best rates and their validation losses: {numbers}",
        )
    ]
