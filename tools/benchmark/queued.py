"""Steps queued on a GPU: device time between two events, separate host time, and a row as each candidate is measured.

Candidates are built, measured and freed one after another, each in a ``try``, so that one that fails or runs out of
memory costs only its own row. The measured speed of a copy is taken next to each: a GPU's clocks change.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_lion import LionError
from tools.benchmark import ours, peers
from tools.benchmark.measure import Candidate, first_line
from tools.benchmark.queued_rows import QueuedRow
from tools.gpu_check import records

ROUNDS = 5
ROUND_MILLISECONDS = 50.0  # device time of a round, in 2 to 20 steps
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}  # more than any cache of a GPU holds
Builder = Callable[[], Candidate]


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
        except Exception as error:  # whatever an unsuitable candidate raises is the result
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


def run(title: str, chosen: dict[str, Builder], numel: int, device: Device, path: Path | None) -> list[QueuedRow]:
    """Measure, print and write each row as it comes; with ``path``, as JSON lines with ``title``."""
    measured = []
    for row in rows(chosen, numel, device):
        measured.append(row)
        records.append(path, benchmark=title, **asdict(row))
        took = f"{row.milliseconds:.2f} ms" if row.milliseconds is not None else f"not measured: {row.error}"
        print(f"{row.name}: {took}", flush=True)
    return measured
