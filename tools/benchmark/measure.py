"""Candidates, stepped in turn, and the table of what was measured."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmark.traffic import READ, UPDATE, WRITE, Stream, streaming_pass

OURS = "megatron-lion"


@dataclass
class Candidate:
    """One way to step.

    ``bytes`` are all that a step reads and writes, counted; None where they cannot be. A step of few passes, each over
    whole tensors, has their streams in ``passes``, so that the limit can pass over the very same tensors.
    ``prepare`` is called before every step and not timed.
    """

    name: str
    state: str
    step: Callable[[], object]
    bytes: int | None = None
    passes: list[list[Stream]] = field(default_factory=list)
    prepare: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        if self.passes and self.bytes is None:
            self.bytes = sum(stream.bytes for streams in self.passes for stream in streams)

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's."""
        return self.name.startswith(OURS)


@dataclass
class Row:
    """What was measured of one candidate.

    ``share_of_limit`` is the time of the streaming pass over the same bytes, over this one's;
    ``times_as_fast`` compares with the fastest peer of the same state.
    """

    name: str
    state: str
    milliseconds: float
    bytes_per_parameter: float | None
    gigabytes_per_second: float | None
    share_of_limit: float | None
    times_as_fast: float | None


def limit_name(passes: Sequence[Sequence[Stream]], numel: int) -> str:
    """What the limit over these passes is called: those that move the same bytes the same way share one."""
    streams = [stream for one in passes for stream in one]
    read, written = (
        sum(stream.bytes / (1 + (stream.mode == UPDATE)) for stream in streams if stream.mode & way) / numel
        for way in (READ, WRITE)
    )
    return f"streaming limit, {read:.4g} B read and {written:.4g} B written"


def limits(candidates: Sequence[Candidate], numel: int) -> list[Candidate]:
    """Streaming passes for each set of reads and writes that a candidate of few passes makes, over its tensors."""
    made: dict[str, Candidate] = {}
    for one in candidates:
        if one.passes and (name := limit_name(one.passes, numel)) not in made:
            steps = [streaming_pass(streams) for streams in one.passes]
            made[name] = Candidate(name, "-", lambda steps=steps: [step() for step in steps], passes=one.passes)
    return list(made.values())


def measure(candidates: Sequence[Candidate], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, stepped in turn; one round before that is not counted."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in range(rounds + 1):
        for candidate in candidates:
            candidate.prepare()
            start = now()
            candidate.step()
            if number >= 1:
                times[candidate.name].append(1e3 * (now() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def now() -> float:
    """Seconds, once everything that was launched is over."""
    if torch.cuda.is_initialized() and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rows(candidates: Sequence[Candidate], times: dict[str, float], numel: int) -> list[Row]:
    """The table, fastest first. A step of several passes is held against the first limit's bytes per second."""
    of_limits = [one for one in candidates if one.state == "-"]  # none where no memory limits the step
    table = []
    for one in sorted(candidates, key=lambda candidate: times[candidate.name]):
        rivals = [
            times[other.name]
            for other in candidates
            if other.state == one.state and other is not one and not other.is_ours and one.state != "-"
        ]
        own = limit_name(one.passes, numel) if one.passes else None
        bound = None
        if one.bytes is not None and of_limits:
            bound = times[own] if own else times[of_limits[0].name] * one.bytes / of_limits[0].bytes
        table.append(
            Row(
                name=one.name,
                state=one.state,
                milliseconds=times[one.name],
                bytes_per_parameter=None if one.bytes is None else one.bytes / numel,
                gigabytes_per_second=None if one.bytes is None else one.bytes / times[one.name] / 1e6,
                share_of_limit=None if bound is None else bound / times[one.name],
                times_as_fast=min(rivals) / times[one.name] if rivals else None,
            )
        )
    return table


def markdown(table: Sequence[Row]) -> str:
    """The table as Markdown."""

    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        "| | state | ms | bytes per parameter | GB/s | share of the limit | times as fast as the fastest peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        numbers = list(asdict(row).values())[2:]
        cells = " | ".join(show(value, digits) for value, digits in zip(numbers, (1, 1, 1, 2, 2), strict=True))
        lines.append(f"| {row.name} | {row.state} | {cells} |")
    return "\n".join(lines)


def not_measured(missing: dict[str, str]) -> str:
    """A paragraph for each reason, with all that were left out for it."""
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    return "".join(f"\nNot measured, {reason}: {'; '.join(names)}\n" for reason, names in reasons.items())


def write_json(path: Path, **record: object) -> None:
    """The record as JSON, for :mod:`tools` that compare machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def plot(table: Sequence[Row], path: Path, title: str) -> None:
    """A bar for each row, SVG or PNG by the name's ending: ours in another colour, with a mark where its limit is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in table if row.state != "-"]
    colours = ["tab:orange" if row.name.startswith(OURS) else "tab:blue" for row in shown]
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(shown) + 1.2), layout="constrained")
    bars = axes.barh([row.name for row in shown], [row.milliseconds for row in shown], color=colours)
    axes.bar_label(bars, [f"{row.milliseconds:.1f}" for row in shown], padding=3, fontsize=8)
    limits_shown = {y: row.milliseconds * row.share_of_limit for y, row in enumerate(shown) if row.share_of_limit}
    edges = [y - 0.4 for y in limits_shown], [y + 0.4 for y in limits_shown]
    axes.vlines(list(limits_shown.values()), *edges, color="black", linewidth=1.5, label="limit for as many bytes")
    axes.legend(fontsize=8)
    axes.margins(x=0.12, y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("ms per step, median")
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
