"""Rows of steps that were queued on a device, and their table. Imports only the standard library."""

from collections.abc import Sequence
from dataclasses import dataclass

OURS = "megatron-lion"
BASELINE = "torch AdamW fused"


@dataclass
class QueuedRow:
    """One candidate: medians of rounds of queued steps, or the error that it raised.

    ``milliseconds`` is device time per step, ``host_milliseconds`` the time until a step has been queued on an idle
    device, ``first_step_seconds`` includes compilation. ``share_of_copy`` compares the bytes per second with a copy's.
    """

    name: str
    state: str = ""
    milliseconds: float | None = None
    host_milliseconds: float | None = None
    first_step_seconds: float | None = None
    bytes_per_parameter: float | None = None
    gigabytes_per_second: float | None = None
    copy_gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    error: str | None = None


def markdown(table: Sequence[QueuedRow]) -> str:
    """The measured rows as Markdown, fastest first, with ratios against the peers of this run; then the errors."""
    lines = [
        "| | state | ms | host ms | bytes per parameter | GB/s | share of copy speed | times as fast as "
        f"{BASELINE} | as the fastest peer of the same state |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    times = {row.name: row.milliseconds for row in table if row.milliseconds}
    for row in sorted((row for row in table if row.name in times), key=lambda row: times[row.name]):
        rivals = [
            times[other.name]
            for other in table
            if other.name in times and other.state == row.state and not other.name.startswith(OURS)
        ]
        is_ours, ms = row.name.startswith(OURS), times[row.name]
        cells = [
            (ms, 2),
            (row.host_milliseconds, 2),
            (row.bytes_per_parameter, 1),
            (row.gigabytes_per_second, 0),
            (row.share_of_copy, 2),
            (times[BASELINE] / ms if BASELINE in times else None, 2),
            (min(rivals) / ms if rivals and is_ours else None, 2),
        ]
        shown = " | ".join("-" if value is None else f"{value:.{digits}f}" for value, digits in cells)
        lines.append(f"| {row.name} | {row.state} | {shown} |")
    errors = [f"- not measured: {row.name}: {row.error}" for row in table if row.error]
    return "\n".join([*lines, "", *errors])
