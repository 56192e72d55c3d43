"""Steps queued on a GPU: device time between two events, host time apart, and a row for each candidate as it comes.

Candidates are built, measured and freed one after another, each in a ``try``, so that one that fails or runs out of
memory costs only its own row. The measured speed of a copy is taken next to each: a GPU's clocks change.
"""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_lion import LionError
from tools.benchmark import ours, peers
from tools.benchmark.measure import OURS, Candidate, first_line

ROUNDS = 5
ROUND_MILLISECONDS = 50.0  # device time of a round, in 2 to 20 steps
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}  # more than any cache of a GPU holds
BASELINE = "torch AdamW fused"
Builder = Callable[[], Candidate]


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


class Device:
    """Times work on ``kind``, "cuda" or "cpu"; on a CPU nothing is queued and the clock is the host's."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def wait(self) -> None:
        """Return when all queued work is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], object], times: int) -> float:
        """Device time of one call of ``work``, of ``times`` that are queued without waiting."""
        if self.kind == "cpu":
            start = time.perf_counter()
            for _ in range(times):
                work()
            return 1e3 * (time.perf_counter() - start) / times
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times

    def host_milliseconds(self, work: Callable[[], object]) -> float:
        """Time until one call of ``work`` returns, from an idle device on."""
        self.wait()
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def free(self) -> None:
        """Give the memory of what was deleted back to the device."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()


def builders(params: peers.Params, names: list[str], device: str) -> dict[str, Builder]:
    """Torch's own optimizers first, then ours, then other packages: what is most likely to fail comes last."""

    def peer(name: str) -> Candidate:
        if reason := peers.reason_missing(peers.PEERS[name], device):
            raise LionError(reason)
        return peers.candidate(name, params)

    made = {name: (lambda name=name: peer(name)) for name in names}
    first = {name: builder for name, builder in made.items() if name.startswith("torch ")}
    return first | ours.gpu_builders(params) | made


def rows(chosen: dict[str, Builder], numel: int, device: Device) -> Iterator[QueuedRow]:
    """Measure each candidate. Whatever it raises is in its row."""
    source = torch.ones(COPY_BYTES[device.kind], dtype=torch.uint8, device=device.kind)
    target = torch.zeros_like(source)
    for name, build in chosen.items():
        try:
            copy_ms = statistics.median(device.milliseconds(lambda: target.copy_(source), 5) for _ in range(ROUNDS))
            row = _measured(build, numel, 2 * source.numel() / copy_ms / 1e6, device)
        except Exception as error:  # whatever a candidate raises where it does not fit: that is the finding
            row = QueuedRow(name, error=str(error) if isinstance(error, LionError) else first_line(error))
        with contextlib.suppress(Exception):  # a lost CUDA context fails here as well
            device.free()
        yield row


def _measured(build: Builder, numel: int, copy_speed: float, device: Device) -> QueuedRow:
    start = time.perf_counter()
    one = build()
    device.wait()
    first_step = time.perf_counter() - start
    one.step()
    times = max(2, min(20, int(ROUND_MILLISECONDS / max(device.milliseconds(one.step, 1), 1e-3))))
    ms = statistics.median(device.milliseconds(one.step, times) for _ in range(ROUNDS))
    host = statistics.median(device.host_milliseconds(one.step) for _ in range(ROUNDS))
    device.wait()
    speed = None if one.bytes is None else one.bytes / ms / 1e6
    return QueuedRow(
        name=one.name,
        state=one.state,
        milliseconds=ms,
        host_milliseconds=host,
        first_step_seconds=first_step,
        bytes_per_parameter=None if one.bytes is None else one.bytes / numel,
        gigabytes_per_second=speed,
        copy_gigabytes_per_second=copy_speed,
        share_of_copy=None if speed is None else speed / copy_speed,
    )


def append(path: Path, **record: object) -> None:
    """Add one JSON line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def run(title: str, chosen: dict[str, Builder], numel: int, device: Device, path: Path | None) -> list[QueuedRow]:
    """Measure, print and write each row as it comes; with ``path``, as JSON lines with ``title``."""
    measured = []
    for row in rows(chosen, numel, device):
        measured.append(row)
        if path:
            append(path, benchmark=title, **asdict(row))
        took = f"{row.milliseconds:.2f} ms" if row.milliseconds is not None else f"not measured: {row.error}"
        print(f"{row.name}: {took}", flush=True)
    return measured


def markdown(table: list[QueuedRow]) -> str:
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
