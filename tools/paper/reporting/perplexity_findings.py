"""Table A1 from the long runs: perplexities of five checkpoints."""

import math
from typing import NamedTuple

from tools.paper.reporting import gaps
from tools.paper.reporting.findings import Finding, Judgement, sentence
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import NAMES, SGDS, Record, StudyRuns, in_seeds, spread, steps_in_thousands
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS, WINDOW_STEP

TEXTS = {"held-out": "test documents", "wikitext": "WikiText-2's test tokens"}
WIKITEXT = (
    "WikiText-2's test tokens are WikiText-103's test articles with more words replaced by the token of unknown words."
)
VALUES = {
    "log_perplexity": "ln perplexity per token",
    "bits_per_byte": "bits per byte",
    "log_word_perplexity": "ln perplexity per word",
}
PAPERS_VOCABULARY = 50_257
ENDS = (CHECKPOINTS[0], STEPS)


def perplexities(runs: StudyRuns) -> Finding:
    """Each text's perplexities, and whether Lion's first checkpoint is below the others' last."""
    text = "wikitext" if all("wikitext" in one["log_perplexity"] for one in runs.records) else "held-out"
    others = [name for name in runs.by_optimizer() if name != "lion_paper"]
    compared = {name: found for name in others if (found := _compare(runs, name, text))}
    sentences = [_sentence(runs, name, found, text) for name, found in compared.items()]
    sentences = sentences or ["Cannot be said: no seed has LION and another optimizer."]
    return Finding(
        verdict=" ".join([*sentences, WIKITEXT, _about_vocabularies(runs.records[0])]),
        made="",
        tables=[_table(runs, text) for text in TEXTS if any(text in one["log_perplexity"] for one in runs.records)],
        judgements=[_judgement(runs, name, found, text) for name, found in compared.items()],
    )


class Compared(NamedTuple):
    """The other's last value minus Lion's, with Lion at the first and at the last checkpoint."""

    first: gaps.Interval
    last: gaps.Interval


def _compare(runs: StudyRuns, other: str, text: str) -> Compared | None:
    """None without a common seed."""
    theirs = runs.by_seed(other, lambda one: one["log_perplexity"][text][str(STEPS)])
    lions = [runs.by_seed("lion_paper", lambda one, s=step: one["log_perplexity"][text][str(s)]) for step in ENDS]
    by_seed = [gaps.differences(theirs, lion) for lion in lions]
    return Compared(*(gaps.interval(list(each.values())) for each in by_seed)) if by_seed[0] else None


def _sentence(runs: StudyRuns, other: str, found: Compared, text: str) -> str:
    word, side = gaps.judged([found.first])
    basis = runs.basis("lion_paper", other, seeds=found.first.seeds)
    return (
        f"{sentence(runs.mark + word)} {runs.where} ({basis}): LION's checkpoint at {ENDS[0]:,} steps is "
        f"{side or 'not shown to be below'} that of {NAMES[other]} at {STEPS:,}. The ln perplexity per token of "
        f"{NAMES[other]} on {TEXTS[text]} minus LION's is {found.first}, and {found.last} with both at {STEPS:,}."
    )


def _judgement(runs: StudyRuns, other: str, found: Compared, text: str) -> Judgement:
    word, side = gaps.judged([found.first])
    _, side_at_end = gaps.judged([found.last])
    at_end = f"LION is {side_at_end}" if side_at_end else "not confirmed"
    of_paper = "" if other in SGDS else " (not in the paper)"
    return Judgement(
        claim=f"LION's first checkpoint has a lower perplexity than the last of {NAMES[other]}, {runs.where}{of_paper}",
        verdict=f"{runs.mark}{word}. With both at {STEPS:,}: {at_end}",
        basis=runs.basis("lion_paper", other, seeds=found.first.seeds),
        numbers=f"ln perplexity per token on {TEXTS[text]}, minus LION: {found.first}; with both at {STEPS:,}: "
        f"{found.last}",
        plain=_plain(runs, other, found.first, side),
    )


def _plain(runs: StudyRuns, other: str, found: gaps.Interval, side: str) -> str:
    if not side or found.half_width is None or other != "sgd_paper":
        return ""
    return (
        f"{sentence(runs.where)} LION's first checkpoint has a perplexity {side} that of the last of {NAMES[other]} "
        f"({in_seeds(found.seeds)})."
    )


def _table(runs: StudyRuns, text: str) -> Table:
    """Each optimizer's values on ``text``; those that its records have."""
    table = [[TEXTS[text], "optimizer", *steps_in_thousands(CHECKPOINTS)]]
    for key, words in VALUES.items():
        for name, of_one in runs.by_optimizer().items():
            known = [one[key][text] for one in of_one if text in one[key]]
            if known:
                table.append([words, NAMES[name], *(spread(one[str(step)] for one in known) for step in CHECKPOINTS)])
    return table


def _about_vocabularies(first: Record) -> str:
    ours = first["settings"]["vocab-size"]
    return (
        f"A value per token of a vocabulary of {ours:,} entries is not comparable with the paper's of "
        f"{PAPERS_VOCABULARY:,}: a uniform prediction has ln {ours} = {math.log(ours):.2f} here and "
        f"{math.log(PAPERS_VOCABULARY):.2f} there. Bits per byte and perplexity per word can be "
        f"compared. Windows of {first['settings']['seq-length']} tokens start every {WINDOW_STEP}; the paper's models "
        "have contexts of 1,024."
    )
