"""How far Lion is ahead of SGD at the paper's rates and at tuned ones, and which part of it is due to the rate."""

from tools.paper.reporting import gaps
from tools.paper.reporting.curve_findings import FIXED, LOSSES, VALIDATION
from tools.paper.reporting.findings import Finding, Judgement, sentence
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import NAMES, PROVISIONAL, StudyRuns, in_seeds, listed_rates
from tools.paper.studies.long_runs import STEPS

PAIR = ("sgd_paper", "lion_paper")
JUDGED = (FIXED, VALIDATION)
# Settings that the studies differ in because the rates do.
OF_RATE = {"lr", "min-lr", "seed"}
BySeed = dict[int, float]


def gap(paper: StudyRuns, tuned: StudyRuns) -> Finding | None:
    """The gap and the rate's share of it, on the fixed training split and on the validation text.

    None while no seed has runs of both optimizers at the paper's rates.
    """
    at_papers = {loss: _gap(paper, loss) for loss in JUDGED}
    at_best = {loss: _gap(tuned, loss) for loss in JUDGED}
    if not at_papers[FIXED]:
        return None
    mark = PROVISIONAL if paper.provisional or tuned.provisional else ""
    said = [share_in_words(loss, at_papers[loss], at_best[loss]) for loss in JUDGED]
    tables = [_gap_table(at_papers, at_best)]
    if gains := _gains(paper, tuned):
        tables.append(gains)
        said += [f"{sentence(one)}." for one in _other_differences(paper, tuned)]
    return Finding(
        verdict=f"{sentence(mark)}SGD with momentum 0.9 minus LION at step {STEPS:,}, paired by seed. {' '.join(said)}",
        made="the runs above",
        about="the share of the learning rate in the gap",
        tables=tables,
        judgements=[_judgement(paper, tuned, mark, at_papers, at_best)] if at_best[FIXED] else [],
    )


def _at_end(runs: StudyRuns, optimizer: str, loss: str) -> BySeed:
    return runs.by_seed(optimizer, lambda one: LOSSES[loss](one, STEPS))


def _gap(runs: StudyRuns, loss: str) -> BySeed:
    sgd, lion = (_at_end(runs, optimizer, loss) for optimizer in PAIR)
    return gaps.differences(sgd, lion)


def share_in_words(loss: str, at_papers: BySeed, at_best: BySeed) -> str:
    """Which part of the gap is due to the rate, or why that cannot be said."""
    seeds = sorted(at_papers.keys() & at_best.keys())
    share, none = gaps.share_of_rate(at_papers, at_best), f"For the {loss} no share of the rate is given, because"
    if share is None:
        if len(seeds) < 2:
            return f"{none} two seeds with all four runs are needed, {len(seeds)} finished."
        found = gaps.interval([at_papers[seed] for seed in seeds])
        return f"{none} the interval of the gap at the paper's rates, {found}, is not above 0."
    said = f"For the {loss} {share} of the gap is due to the learning rate ({in_seeds(len(seeds))})."
    if share.value > 1.0:
        return f"{said} That is more than the gap: at the best rates SGD's mean loss is below LION's."
    if share.value < 0.0:
        return f"{said} That is less than nothing: the gap is wider at the best rates."
    if share.high >= 1.0:
        said += " The interval includes 100 %: at the best rates there may be no gap."
    return said + (" The interval includes 0 %: perhaps nothing is due to the rate." if share.low <= 0.0 else "")


def _gap_table(at_papers: dict[str, BySeed], at_best: dict[str, BySeed]) -> Table:
    head = ["SGD minus LION", "at the paper's rates", "seeds", "at each one's best rate", "seeds"]
    table = [[*head, "share of the rate [95 %]", "of each seed"]]
    for loss in JUDGED:
        cells = []
        for by_seed in (at_papers[loss], at_best[loss]):
            cells += [str(gaps.interval(list(by_seed.values()))) if by_seed else "-", str(len(by_seed))]
        share = gaps.share_of_rate(at_papers[loss], at_best[loss])
        cells.append(str(share) if share else "-")
        cells.append(", ".join(f"{100 * value:.0f} %" for value in share.by_seed) if share else "-")
        table.append([loss, *cells])
    return table


def _gains(paper: StudyRuns, tuned: StudyRuns) -> Table:
    """The loss at the paper's rate minus that at the best one, of each optimizer; empty without a common seed."""
    table = [["gain of the best rate", "rates", "seeds", *JUDGED]]
    for name in PAIR:
        gains = {loss: gaps.differences(_at_end(paper, name, loss), _at_end(tuned, name, loss)) for loss in JUDGED}
        if gains[FIXED]:
            rates = " -> ".join(listed_rates(runs.by_optimizer()[name]) for runs in (paper, tuned))
            cells = [str(gaps.interval(list(by_seed.values()))) for by_seed in gains.values()]
            table.append([NAMES[name], rates, str(len(gains[FIXED])), *cells])
    return table if len(table) > 1 else []


def _other_differences(paper: StudyRuns, tuned: StudyRuns) -> list[str]:
    """What else the tuned runs change, from the records' settings."""
    found = []
    for name in PAIR:
        groups = [runs.by_optimizer().get(name) for runs in (paper, tuned)]
        if all(groups):
            before, after = (group[0]["settings"] for group in groups if group)
            keys = sorted((before.keys() | after.keys()) - OF_RATE)
            found += [
                f"{key} {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)
            ]
    listed = ", ".join(dict.fromkeys(found))
    return [f"the runs at the best rates differ in more than the rate: {listed}"] if listed else []


def _judgement(
    paper: StudyRuns, tuned: StudyRuns, mark: str, at_papers: dict[str, BySeed], at_best: dict[str, BySeed]
) -> Judgement:
    shares = {loss: gaps.share_of_rate(at_papers[loss], at_best[loss]) for loss in JUDGED}
    verdict = "; ".join(f"{share} of the gap in the {loss}" for loss, share in shares.items() if share)
    if verdict and all(share.low > 1.0 for share in shares.values() if share):
        verdict = f"more than all: at the best rates SGD is below LION. {verdict}"
    numbers = [
        f"{loss}: {gaps.interval(list(at_papers[loss].values()))} at the paper's rates, "
        f"{gaps.interval(list(at_best[loss].values()))} at the best ones"
        for loss in JUDGED
    ]
    bases = [runs.basis(*PAIR, seeds=len(found[FIXED])) for runs, found in ((paper, at_papers), (tuned, at_best))]
    share = shares[FIXED]
    plain = f"{share} of the gap to SGD (momentum 0.9) is due to the learning rate." if share else ""
    return Judgement(
        claim="Part of LION's lead over SGD that is due to the learning rate (not in the paper)",
        verdict=f"{mark}{verdict or 'no share can be given'}",
        basis="; ".join(bases),
        numbers="; ".join([*numbers, *_other_differences(paper, tuned)]),
        plain=plain,
    )
