"""Which ranks to rehearse, and a process for each, one after the other."""

import json
import multiprocessing
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lion import run
from megatron_lion.cli.output_file import append_output_to
from megatron_lion.config import LionError
from megatron_lion.integration.rehearsal import one_rank
from megatron_lion.integration.rehearsal.one_rank import RankReport

LAST_LINES = 25


class WouldNotStart(Exception):
    """A rank ended before its first step. The message has what it printed."""


def rehearse(options: Any) -> list[RankReport]:
    """Rehearse the ranks that ``options`` ask for. Raises WouldNotStart for the first one that would not start."""
    one_rank.preload()
    chosen = range(options.world_size) if options.ranks == "all" else options.rank
    if chosen:
        return [_rehearse_one(rank, options) for rank in dict.fromkeys(chosen)]
    first = _rehearse_one(0, options)
    return [first, *(_rehearse_one(rank, options) for rank in distinct(first) if rank != 0)]


def distinct(first: RankReport) -> list[int]:
    """One rank of each kind, by the report of rank 0.

    The pipeline stages: the first, the middle and the last one, or all of them if their layers differ. Of each the
    first and the last data-parallel shard, which may end in padding. Tensor-parallel and expert-parallel ranks of a
    stage hold parameters of the same shapes.
    """
    stages = first.stages
    chosen = [stages[0], stages[len(stages) // 2], stages[-1]] if first.stages_alike else stages
    shards = (0, first.replicas[-1] - first.replicas[0])
    return list(dict.fromkeys(stage + shard for stage in chosen for shard in shards))


def _rehearse_one(rank: int, options: Any) -> RankReport:
    """Rehearse ``rank`` in a forked process, which has Megatron imported."""
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder) / "log", Path(folder) / "report.json"
        print(f"rehearsing rank {rank} of {options.world_size} ...", file=sys.stderr, flush=True)
        process = multiprocessing.get_context("fork").Process(target=_child, args=(rank, options, log, result))
        process.start()
        process.join()
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        if not result.exists():
            raise WouldNotStart(_why(rank, options.world_size, process.exitcode, lines))
        ours = [line for line in lines if line.startswith("megatron-lion:")]
        if ours:
            print("\n".join(ours), file=sys.stderr, flush=True)
        return RankReport(**json.loads(result.read_text(encoding="utf-8")))


def _child(rank: int, options: Any, log: Path, result: Path) -> None:
    """Write the report of ``rank`` to ``result`` and everything that it prints to ``log``."""
    append_output_to(log)
    run.GRACE_SECONDS = 0.0  # no other rank prints first
    try:
        report = one_rank.rehearse(
            options.script, options.flags, rank=rank, world_size=options.world_size, steps=options.steps
        )
    except LionError as error:
        run.report_error(error)
        sys.exit(2)
    result.write_text(json.dumps(asdict(report)), encoding="utf-8")


def _why(rank: int, world_size: int, status: int | None, lines: list[str]) -> str:
    """What a real run prints: its one-line error if there is one, else the end of its log."""
    errors = [line for line in lines if line.startswith("megatron-lion: error:")]
    said = errors[-1:] or lines[-LAST_LINES:]
    return "\n".join([*said, f"rank {rank} of {world_size} would not start (exit status {status})"])
