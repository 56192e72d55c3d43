"""What tools/paper/long_runs.py left: figures 2 and 3 and table A1 at the paper's settings, in miniature."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tools.paper.reporting import drawings, size_findings
from tools.paper.reporting.findings import Finding
from tools.paper.reporting.paper import Table
from tools.paper.studies import long_records
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS
from tools.paper.studies.plans import OPTIMIZERS, SEEDS

Records = list[dict[str, Any]]
NAMES = {
    "lion_paper": "LION",
    "sgd_paper": "SGD, momentum 0.9",
    "sgd_paper_no_momentum": "SGD, no momentum",
}
TEXTS = {"held-out": "held-out text", "wikitext": "WikiText-2's test tokens"}
WIKITEXT = "WikiText-2's test tokens are WikiText-103's test articles with more words replaced by <unk>."
LAST = str(STEPS)


def find(exhibit: str, folder: Path, hardware: str) -> Finding | None:
    """The finding about ``exhibit`` from the records in ``folder``, or None where the long runs say nothing of it.

    Raises LionError for a damaged record.
    """
    if exhibit not in MAKERS:
        return None
    study, model, make = MAKERS[exhibit]
    records = [one for one in long_records.read(folder) if one["model"] == model and one["study"] == study]
    planned = size_findings.planned() if study == "sizes" else SEEDS[model] * len(OPTIMIZERS)
    missing = [f"{len(records)} of {planned} long runs are finished"] if len(records) < planned else []
    if not records:
        return Finding(verdict="Long runs: none is finished.", made=hardware, missing=missing)
    found = make(records)
    found.made = f"{_made(records)}; {hardware}"
    found.missing = missing
    return found


def by_optimizer(records: Records) -> dict[str, Records]:
    """The records of each optimizer that has any, in the order of the study."""
    found = {name: [record for record in records if record["optimizer"] == name] for name in OPTIMIZERS}
    return {name: of_one for name, of_one in found.items() if of_one}


def _made(records: Records) -> str:
    first, hours = records[0], sum(record["cpu_hours"] for record in records)
    shape = first["settings"]
    size = f"{shape['num-layers']} layers, {shape['hidden-size']} wide, d = {first['d']:,}"
    batch = f"batches of {shape['global-batch-size']} x {shape['seq-length']} tokens"
    rates = ", ".join(
        f"{NAMES[name]} {of_one[0]['settings']['lr']:g} ({len({one['seed'] for one in of_one})} seeds)"
        for name, of_one in by_optimizer(records).items()
    )
    text = f"{first['tokens']['train']:,} tokens of English from packages"
    run = f"the paper's recipe at another size: {size}, {batch}, fp32, {STEPS:,} steps"
    return f"{run}; {text}; learning rates: {rates}; {hours:.1f} hours of one core"


def _curves(records: Records) -> Finding:
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
    loss = _compared(groups, "the exact training loss at step 50,000", lambda one: one["exact"][LAST]["loss"])
    return Finding(
        verdict=f"{loss} One size says nothing about sqrt(d). Exact losses and ratios are over a fixed split of the "
        f"training text ({records[0]['tokens']['fixed']:,} tokens), without dropout.",
        made="",
        pictures={"bands are the seeds' smallest and largest": drawings.long_runs(groups, NAMES)},
        tables=[table],
    )


def _perplexities(records: Records) -> Finding:
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
    return Finding(verdict=f"{_first_below_last(groups)} {WIKITEXT}", made="", tables=tables)


def _first_below_last(groups: dict[str, Records]) -> str:
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
                f"{verb} against {NAMES[name]} at the paper's rates: Lion's first checkpoint has {_spread(first)}, "
                f"SGD's last {_spread(last)}."
            )
    return " ".join(said)


def _compared(groups: dict[str, Records], what: str, value: Callable[[dict[str, Any]], float]) -> str:
    if not {"lion_paper", "sgd_paper"} <= groups.keys():
        return "Cannot be said: both optimizers are needed."
    lion, sgd = ([value(one) for one in groups[name]] for name in ("lion_paper", "sgd_paper"))
    verb = "Confirmed" if max(lion) < min(sgd) else "Not confirmed"
    return f"{verb} at the paper's rates, for {what}: LION {_spread(lion)}, SGD {_spread(sgd)}."


def _spread(values: Iterable[float]) -> str:
    """The mean, and the smallest and the largest of several."""
    listed = list(values)
    mean = f"{statistics.fmean(listed):.3f}"
    return mean if len(listed) == 1 else f"{mean} ({min(listed):.3f} to {max(listed):.3f})"


# By exhibit: the study and the family of models of its runs, and what makes the finding.
MAKERS: dict[str, tuple[str, str, Callable[[Records], Finding]]] = {
    "Figure 2": ("paper", "bert", _curves),
    "Figure 3": ("paper", "gpt", _curves),
    "Table A1": ("paper", "gpt", _perplexities),
    "Section 5": ("sizes", "gpt", size_findings.exponents),
}
