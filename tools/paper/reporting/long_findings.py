"""What tools/paper/long_runs.py left: figures 2 and 3 and table A1 at the paper's settings, in miniature."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tools.paper.reporting import drawings, gaps, rate_findings, size_findings
from tools.paper.reporting.findings import Finding
from tools.paper.reporting.paper import Table
from tools.paper.studies import long_records
from tools.paper.studies import rates as constants
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS
from tools.paper.studies.plans import OPTIMIZERS, SEEDS

Records = list[dict[str, Any]]
NAMES = {
    "lion_paper": "LION",
    "sgd_paper": "SGD, momentum 0.9",
    "sgd_paper_no_momentum": "SGD, no momentum",
    "adamw": "AdamW",
}
# By study: at which rates its runs are.
RATES_OF = {"paper": "at the paper's rates", "tuned": "at each optimizer's best rate", "sizes": "of several sizes"}
TEXTS = {"held-out": "held-out text", "wikitext": "WikiText-2's test tokens"}
WIKITEXT = "WikiText-2's test tokens are WikiText-103's test articles with more words replaced by <unk>."
NONE = "Long runs {}: none is finished."
LAST = str(STEPS)


def find(exhibit: str, folder: Path, hardware: str) -> list[Finding]:
    """The findings about ``exhibit`` from the records in ``folder``; none where the long runs say nothing of it.

    Raises LionError for a damaged record.
    """
    every = long_records.read(folder)
    found = []
    for study, model, make in MAKERS.get(exhibit, []):
        records = [one for one in every if one["model"] == model and one["study"] == study]
        planned = size_findings.planned() if study == "sizes" else SEEDS[model] * len(OPTIMIZERS)
        missing = [f"{len(records)} of {planned} long runs are finished"] if len(records) < planned else []
        one = make(records, RATES_OF[study]) if records else Finding(verdict=NONE.format(RATES_OF[study]), made="")
        one.made = f"{_made(records)}; {hardware}" if records else hardware
        one.missing += missing
        found.append(one)
    if exhibit == "Figure 3" and (sentence := _share_of_rate(every)):
        found[-1].verdict += f" {sentence}"
    return found


def _share_of_rate(records: Records) -> str:
    """What the gap between Lion and SGD owes to the learning rate; empty until both studies have runs of both."""
    losses = {
        (study, optimizer): [
            one["exact"][LAST]["loss"] for one in records if (one["study"], one["optimizer"]) == (study, optimizer)
        ]
        for study in ("paper", "tuned")
        for optimizer in ("sgd_paper", "lion_paper")
    }
    if not all(losses.values()):
        return ""
    at_papers, at_tuned = (
        gaps.gap(losses[study, "sgd_paper"], losses[study, "lion_paper"]) for study in ("paper", "tuned")
    )
    return gaps.share_of_rate(at_papers, at_tuned)


def by_optimizer(records: Records) -> dict[str, Records]:
    """The records of each optimizer that has any, in the order of ``NAMES``."""
    found = {name: [record for record in records if record["optimizer"] == name] for name in NAMES}
    return {name: of_one for name, of_one in found.items() if of_one}


def _made(records: Records) -> str:
    first, hours = records[0], sum(record["cpu_hours"] for record in records)
    shape, sizes, steps = first["settings"], sorted({one["d"] for one in records}), {one["steps"] for one in records}
    d = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    batch = f"batches of {shape['global-batch-size']} x {shape['seq-length']} tokens"
    rates = ", ".join(
        f"{NAMES[name]} {of_one[0]['settings']['lr']:g} ({len({one['seed'] for one in of_one})} seeds)"
        for name, of_one in by_optimizer(records).items()
    )
    text = f"{first['tokens']['train']:,} tokens of English from packages"
    size = f"{shape['num-layers']} layers, d = {d}, {batch}, fp32, {max(steps):,} steps"
    return f"the paper's recipe at another size: {size}; {text}; learning rates: {rates}; {hours:.1f} hours of one core"


def _curves(records: Records, where: str) -> Finding:
    """Training and held-out loss, exact loss, and r over training."""
    groups = by_optimizer(records)
    ratios = ["exact r / sqrt(d), step 0", "10k to 50k"]
    table: Table = [["optimizer", "seeds", "training loss", "held-out loss", "exact loss", *ratios]]
    for name, of_one in groups.items():
        shares = [one["exact"][str(step)]["ratio_over_sqrt_d"] for one in of_one for step in CHECKPOINTS]
        cells = [_spread(one["training_loss"][LAST] for one in of_one)]
        cells += [_spread(one["validation_loss"][LAST] for one in of_one)]
        cells += [_spread(one["exact"][LAST]["loss"] for one in of_one)]
        cells += [_spread(one["exact"]["0"]["ratio_over_sqrt_d"] for one in of_one)]
        table.append([NAMES[name], str(len(of_one)), *cells, f"{min(shares):.3f} to {max(shares):.3f}"])
    loss = _compared(groups, where, "the exact training loss at step 50,000", lambda one: one["exact"][LAST]["loss"])
    return Finding(
        verdict=f"{loss} One size says nothing about sqrt(d). Exact losses and ratios are over a fixed split of the "
        f"training text ({records[0]['tokens']['fixed']:,} tokens), without dropout.",
        made="",
        pictures={"bands are the seeds' smallest and largest": drawings.long_runs(groups, NAMES)},
        tables=[table],
    )


def _perplexities(records: Records, where: str) -> Finding:
    """The logarithm of the perplexity of five checkpoints on each text."""
    groups, tables = by_optimizer(records), []
    for text, words in TEXTS.items():
        rows = {
            name: [[one["log_perplexity"][text][str(step)] for step in CHECKPOINTS] for one in of_one]
            for name, of_one in groups.items()
            if all(text in one["log_perplexity"] for one in of_one)
        }
        table = [[f"ln perplexity on {words}", *(f"{step // 1000}k" for step in CHECKPOINTS)]]
        for name, values in rows.items():
            table.append([NAMES[name], *(_spread(at_step) for at_step in zip(*values, strict=True))])
        tables += [table] if rows else []
    return Finding(verdict=f"{_first_below_last(groups, where)} {WIKITEXT}", made="", tables=tables)


def _first_below_last(groups: dict[str, Records], where: str) -> str:
    """The paper's claim: Lion's first checkpoint is below SGD's last."""
    if not {"lion_paper", "sgd_paper"} <= groups.keys():
        return "Cannot be said: both optimizers are needed."
    text = "wikitext" if all("wikitext" in one["log_perplexity"] for one in groups["lion_paper"]) else "held-out"
    first = [one["log_perplexity"][text][str(CHECKPOINTS[0])] for one in groups["lion_paper"]]
    said = []
    for name in ("sgd_paper", "sgd_paper_no_momentum"):
        last = [one["log_perplexity"][text][LAST] for one in groups.get(name, [])]
        if last:
            verb = "Confirmed" if max(first) < min(last) else "Not confirmed"
            said.append(
                f"{verb} against {NAMES[name]} {where}: Lion's first checkpoint has {_spread(first)}, "
                f"SGD's last {_spread(last)}."
            )
    return " ".join(said)


def _compared(groups: dict[str, Records], where: str, what: str, value: Callable[[dict[str, Any]], float]) -> str:
    if not {"lion_paper", "sgd_paper"} <= groups.keys():
        return "Cannot be said: both optimizers are needed."
    lion, sgd = ([value(one) for one in groups[name]] for name in ("lion_paper", "sgd_paper"))
    verb = "Confirmed" if max(lion) < min(sgd) else "Not confirmed"
    return f"{verb} {where}, for {what}: LION {_spread(lion)}, SGD {_spread(sgd)}."


def _spread(values: Iterable[float]) -> str:
    """The mean, and the smallest and the largest of several."""
    listed = list(values)
    mean = f"{statistics.fmean(listed):.3f}"
    return mean if len(listed) == 1 else f"{mean} ({min(listed):.3f} to {max(listed):.3f})"


def _constants(records: Records, where: str) -> Finding:
    """Figure A3: the constants of (A1) and (A2) from the rounds of 100 batches."""
    groups = by_optimizer(records)
    if not {"lion_paper", "sgd_paper"} <= groups.keys():
        return Finding(verdict=f"Cannot be said {where}: both optimizers are needed.", made="")
    repeats = {}
    for name, of_one in (("lion", groups["lion_paper"]), ("sgd", groups["sgd_paper"])):
        rounds = [one["rounds"] for one in of_one]
        repeats[name] = {
            "steps": rounds[0]["iteration"],
            "d": of_one[0]["d"],
            "norms": [one[constants.NORMS[name]] for one in rounds],
            "l2_norms": [one["l2"] for one in rounds],
            "converged": sum(map(bool, (mark for one in rounds for mark in one["converged"]))),
            "rounds": sum(len(one["l2"]) for one in rounds),
            "lr": of_one[0]["settings"]["lr"],
        }
    return rate_findings.compared(constants.constants(repeats), made="", pictures={})


# By exhibit: the studies and families of models that say something of it, and what makes each finding.
MAKERS: dict[str, list[tuple[str, str, Callable[[Records, str], Finding]]]] = {
    "Figure 2": [("paper", "bert", _curves)],
    "Figure 3": [("paper", "gpt", _curves), ("tuned", "gpt", _curves)],
    "Figure A3": [("paper", "gpt", _constants), ("tuned", "gpt", _constants)],
    "Table A1": [("paper", "gpt", _perplexities), ("tuned", "gpt", _perplexities)],
    "Section 5": [("sizes", "gpt", size_findings.exponents)],
}
