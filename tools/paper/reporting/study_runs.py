"""The finished long runs of one study and family of models, which every finding about them starts from."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from tools.paper.reporting.findings import counted
from tools.paper.studies import long_text, plans

Record = dict[str, Any]
Records = list[Record]
NAMES = {
    "lion_paper": "LION",
    "sgd_paper": "SGD (momentum 0.9)",
    "sgd_paper_no_momentum": "SGD (no momentum)",
    "adamw": "AdamW",
}
SGDS = ("sgd_paper", "sgd_paper_no_momentum")
# By study: at which rates its runs are.
RATES_OF = {
    "paper": "at the paper's rates",
    "search": "in the rate search",
    "tuned": "at the best rates of a 5,000-step search",
    "sizes": "with several sizes",
}
PROVISIONAL = "provisional: "


@dataclass(frozen=True, kw_only=True)
class StudyRuns:
    """The records of one study and family of models, without those of diverged runs."""

    study: str
    model: str
    records: Records
    missing: list[str]
    """planned runs that are not finished, and diverged ones, in words"""
    provisional: bool
    """whether planned runs are not finished"""

    @property
    def where(self) -> str:
        return RATES_OF[self.study]

    @property
    def mark(self) -> str:
        """What a verdict starts with while runs are missing."""
        return PROVISIONAL if self.provisional else ""

    def by_optimizer(self) -> dict[str, Records]:
        """The records of each optimizer that has any, in the order of ``NAMES``."""
        found = {name: [one for one in self.records if one["optimizer"] == name] for name in NAMES}
        return {name: of_one for name, of_one in found.items() if of_one}

    def by_seed(self, optimizer: str, value: Callable[[Record], float]) -> dict[int, float]:
        """``value`` of each seed of ``optimizer``."""
        return {one["seed"]: value(one) for one in self.records if one["optimizer"] == optimizer}

    def basis(self, *optimizers: str, seeds: int) -> str:
        """Family, d, rates, steps and number of seeds of a comparison of ``optimizers``."""
        chosen = [one for one in self.records if one["optimizer"] in optimizers]
        rates = " and ".join(f"{NAMES[name]} at {listed_rates(self.by_optimizer()[name])}" for name in optimizers)
        size = f"{self.model.upper()}, d = {span_of(chosen, 'd')}"
        return f"{size}, {rates}, {span_of(chosen, 'steps')} steps, {in_seeds(seeds)}"

    def made(self) -> str:
        """Model, data, steps, rates and time of all runs."""
        first, records = self.records[0], self.records
        shape = first["settings"]
        batch = f"batches of {shape['global-batch-size']} x {shape['seq-length']} tokens"
        size = f"{shape['num-layers']} layers, d = {span_of(records, 'd')}, {batch}, fp32"
        size += f", {span_of(records, 'steps')} steps"
        text = f"{first['tokens']['train']:,} tokens of English from packages"
        rates = ", ".join(
            f"{NAMES[name]} {listed_rates(of_one)} ({_seeds_and_lengths(of_one)})"
            for name, of_one in self.by_optimizer().items()
        )
        hours = sum(one["cpu_hours"] for one in records)
        measured = sum(one["measure_cpu_hours"] for one in records)
        time = f"{hours:.1f} hours of one core" + (f" and {measured:.1f} for the measurements" if measured else "")
        losses = "; losses are the sum of masked-word and sentence-order loss" if self.model == "bert" else ""
        return f"the paper's recipe at another size: {size}; {text}{losses}; learning rates: {rates}; {time}"


def _seeds_and_lengths(records: Records) -> str:
    """The number of seeds; where seeds have runs of other lengths, how many have the longest."""
    steps = max(one["steps"] for one in records)
    seeds = {one["seed"] for one in records}
    longest = {one["seed"] for one in records if one["steps"] == steps}
    rest = f", {steps:,} steps with {in_seeds(len(longest))}" if longest < seeds else ""
    return f"{in_seeds(len(seeds))}{rest}"


def select(every: Records, study: str, model: str) -> StudyRuns:
    """The runs of ``study`` and ``model`` among the records of all."""
    own = [one for one in every if (one["study"], one["model"]) == (study, model)]
    # A rate of the search may diverge: the search's finding says so.
    kept = own if study == "search" else [one for one in own if is_finite(one)]
    missing, names = [], [one["name"] for one in own]
    try:
        texts = {model: long_text.paths(Path(), model)}
        planned = {run.name for run in plans.PLANS[study](Path(), texts, every)}
    except LionError as error:  # the search gives the rates
        missing.append(f"{len(own)} long runs {RATES_OF[study]} are finished; {error}")
    else:
        if unfinished := planned - set(names):
            done = f"{len(planned) - len(unfinished)} of {len(planned)}"
            missing.append(f"{done} long runs {RATES_OF[study]} are finished")
    provisional = bool(missing)
    if diverged := [name for name in names if name not in {one["name"] for one in kept}]:
        missing.append(f"left out, because they diverged: {', '.join(diverged)}")
    return StudyRuns(study=study, model=model, records=kept, missing=missing, provisional=provisional)


def is_finite(record: Record) -> bool:
    """Whether every loss and norm of a record is a finite number."""
    return all(value is not None and math.isfinite(value) for value in _values(record))


def _values(record: Record) -> Iterator[float | None]:
    yield from record["training_loss"].values()
    yield from record["validation_loss"].values()
    for exact in record["exact"].values():
        yield from (exact["loss"], exact["l1"], exact["l2"])
    for key in ("l1", "l2"):
        yield from record["rounds"][key]


def listed_rates(records: Sequence[Record]) -> str:
    """The learning rates of ``records``, each once."""
    return ", ".join(f"{lr:g}" for lr in sorted({one["settings"]["lr"] for one in records}))


def span_of(records: Sequence[Record], key: str) -> str:
    """:func:`span` of a whole number of the records."""
    return span(one[key] for one in records)


def span(values: Iterable[float], form: str = ",") -> str:
    """The smallest and the largest of some numbers, in the format ``form``; one number where they are equal."""
    ordered = sorted(values)
    return " to ".join(f"{value:{form}}" for value in dict.fromkeys((ordered[0], ordered[-1])))


def spread(values: Iterable[float], digits: int = 3) -> str:
    """The mean, and the smallest and the largest of several."""
    listed = list(values)
    mean = f"{statistics.fmean(listed):.{digits}f}"
    return mean if len(listed) == 1 else f"{mean} ({min(listed):.{digits}f} to {max(listed):.{digits}f})"


def in_seeds(count: int) -> str:
    """``one seed`` or ``3 seeds``."""
    return "one seed" if count == 1 else counted(count, "seed")


def steps_in_thousands(steps: Iterable[int]) -> list[str]:
    """``0``, ``10k``, ``20k`` for the head of a table."""
    return [f"{step // 1000}k" if step else "0" for step in steps]
