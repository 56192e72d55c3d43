"""Candidates, stepped in turn, and the table of what was measured."""

import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tools.benchmark.queued_rows import OURS
from tools.benchmark.traffic import Stream, streaming_pass

# Names of the passes by the number of elements that they fetch ahead. The faster one is a candidate's limit, because a
# CPU's own prefetching may not reach the speed of its memory.
PASSES = {"the limit of ": 0, "the limit, fetched ahead, of ": 512}
EVICTING_BYTES = 1 << 30  # more than any cache holds
# The rows of the figure, and their names there; the table has all.
FIGURE = {
    "megatron-lion fused": "megatron-lion, fp32 state",
    "megatron-lion fused, remainder, int8 momentum, bf16 gradient": "megatron-lion, 3.1 bytes of state",
    "DeepSpeed CPULion": "DeepSpeed CPULion",
    "torch AdamW fused": "torch AdamW, fused",
    "emerging-optimizers Lion": "emerging-optimizers Lion (stock Megatron's)",
    "lion-pytorch eager": "lion-pytorch",
}


@dataclass
class Candidate:
    """One way to step.

    ``bytes`` are all that a step reads and writes, counted; None where they cannot be. A step of few passes, each over
    whole tensors, has their streams in ``passes``, so that the limit uses the same tensors. ``prepare`` is called
    before every step and not timed.
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

    ``limit_milliseconds`` is the time of a streaming pass over its tensors, and ``share_of_limit`` that over its own;
    ``times_as_fast`` compares with the fastest peer of the same state.
    """

    name: str
    state: str
    milliseconds: float
    bytes_per_parameter: float | None
    gigabytes_per_second: float | None
    limit_milliseconds: float | None
    share_of_limit: float | None
    times_as_fast: float | None


def limits(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Streaming passes over the tensors of each candidate of few passes, with its reads and writes.

    Each candidate has a pass over its own tensors, because one part of a machine's memory can be much slower than
    another.
    """
    return [
        Candidate(kind + one.name, "-", functools.partial(_all, [streaming_pass(each, ahead) for each in one.passes]))
        for one in candidates
        if one.passes
        for kind, ahead in PASSES.items()
    ]


def _all(steps: Sequence[Callable[[], object]]) -> None:
    for step in steps:
        step()


def measure(
    candidates: Sequence[Candidate],
    rounds: int,
    *,
    evict: bool = True,
    pick: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median (or ``pick`` of the) milliseconds of each, stepped in turn; one round before that is not counted.

    Candidates share tensors, and the last cache of some CPUs holds a good part of them. So each round has its own
    order, the same on every rank, and with ``evict`` the caches are filled with other memory before every step.
    """
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    other = torch.zeros(EVICTING_BYTES if evict else 0, dtype=torch.uint8)
    draw = random.Random(0)
    for number in range(rounds + 1):
        for candidate in draw.sample(candidates, len(candidates)):
            other.add_(1)
            candidate.prepare()
            start = now()
            candidate.step()
            if number >= 1:
                times[candidate.name].append(1e3 * (now() - start))
    return {name: pick(values) for name, values in times.items()}


def now() -> float:
    """Seconds, after everything that was launched has ended."""
    if torch.cuda.is_initialized() and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rows(candidates: Sequence[Candidate], times: dict[str, float], numel: int) -> list[Row]:
    """The table, fastest first. Steps of many passes are compared with the bytes per second of the first limit."""
    bounds = {
        one.name: min(times[kind + one.name] for kind in PASSES)
        for one in candidates
        if one.passes and all(kind + one.name in times for kind in PASSES)
    }
    per_byte = next((bounds[one.name] / one.bytes for one in candidates if one.name in bounds), None)
    table = []
    for one in sorted(candidates, key=lambda candidate: times[candidate.name]):
        rivals = [
            times[other.name]
            for other in candidates
            if other.state == one.state and other is not one and not other.is_ours
        ]
        bound = bounds.get(one.name)
        if bound is None and one.bytes is not None and per_byte is not None:
            bound = one.bytes * per_byte
        table.append(
            Row(
                name=one.name,
                state=one.state,
                milliseconds=times[one.name],
                bytes_per_parameter=None if one.bytes is None else one.bytes / numel,
                gigabytes_per_second=None if one.bytes is None else one.bytes / times[one.name] / 1e6,
                limit_milliseconds=bound,
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
        "| | state | ms | bytes per parameter | GB/s | limit, ms | share of it | times as fast as the fastest peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        numbers = list(asdict(row).values())[2:]
        cells = " | ".join(show(value, digits) for value, digits in zip(numbers, (1, 1, 1, 1, 2, 2), strict=True))
        lines.append(f"| {row.name} | {row.state} | {cells} |")
    return "\n".join(lines)


def not_measured(missing: dict[str, str]) -> str:
    """A paragraph for each reason, with all that were left out for it."""
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    return "".join(f"\nNot measured, {reason}: {'; '.join(names)}\n" for reason, names in reasons.items())


def first_line(error: Exception) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def write_json(path: Path, **record: object) -> None:
    """The record as JSON, for :mod:`tools` that compare machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def plot(table: Sequence[Row], path: Path, title: str) -> None:
    """A dot for each row of ``FIGURE`` that was measured, SVG or PNG by the name's ending; marks where its limit is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in table if row.name in FIGURE] or list(table[:6])
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(shown) + 1.3), layout="constrained")
    for is_ours, name, color in ((True, "megatron-lion", "tab:orange"), (False, "others", "tab:blue")):
        at = [y for y, row in enumerate(shown) if row.name.startswith(OURS) is is_ours]
        axes.plot([shown[y].milliseconds for y in at], at, "o", color=color, markersize=8, label=name)
    limits = {y: row.limit_milliseconds for y, row in enumerate(shown) if row.limit_milliseconds}
    axes.plot(list(limits.values()), list(limits), "|", color="black", markersize=14, label="limit for its bytes")
    for y, row in enumerate(shown):
        axes.annotate(
            f"{row.milliseconds:.0f} ms", (row.milliseconds, y), (8, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(shown)), [FIGURE.get(row.name, row.name) for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * max(row.milliseconds for row in shown))
    axes.set_xlabel("ms per step, median")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper right")
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
