"""The report of ``megatron-lion doctor --cluster``, printed by rank 0."""

import os
import sys
import time
from statistics import median
from typing import Any

import torch

from megatron_lion.cli.cluster import network, rank_facts
from megatron_lion.cli.cluster.rank_runner import RankRunner, RanksUnreachable
from megatron_lion.config import LionError

COLUMNS = ("machine", "node", "python", "torch", "megatron-core", "megatron-lion", "device")


def main(timeout: float, megabytes: int) -> int:
    """Check the ranks of this launcher. Returns 0 if all is well, else 1. The last lines have the reasons.

    Each stage waits ``timeout`` seconds at most; all-reduce and links are measured with ``megabytes`` MiB.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        runner = RankRunner(timeout)
        problems = _problems(runner, megabytes)
    except LionError as error:
        if rank == 0 or (isinstance(error, RanksUnreachable) and 0 in error.ranks):
            print(f"\nNOT READY: {error}", flush=True)
        return _leave(1, rank)
    if rank == 0:
        print("".join(f"\nNOT READY: {problem}" for problem in problems) or "\nREADY: the ranks agree", flush=True)
    return _leave(1 if problems else 0, rank)


def _leave(status: int, rank: int) -> int:
    """Exit with ``status``. After a failure exit at once, because a thread may hang in a collective."""
    if status:
        time.sleep(0.0 if rank == 0 else 1.0)  # rank 0 prints first: launchers end all ranks when one fails
        sys.stdout.flush()
        os._exit(status)
    torch.distributed.destroy_process_group()
    return status


def _problems(runner: RankRunner, megabytes: int) -> list[str]:
    """Run the stages, print their results, and return the problems, the same on every rank.

    A problem that would make later stages hang, or make their results meaningless, ends the checks.
    """
    facts = runner.ask("who is there", rank_facts.collect())
    offsets = runner.run_on_all_ranks("clock", lambda: network.clock_offset(runner))
    _print(runner, _table(facts, offsets))
    problems = rank_facts.mismatches(facts) + rank_facts.gpu_problems(facts) + rank_facts.clock_problems(offsets, facts)
    if len({fact["device"] == "CPU" for fact in facts}) > 1 or any(fact["device"] == "no GPU" for fact in facts):
        return [*problems, "all-reduce and links were not tried: first give every rank a device"]
    device = network.device_of_rank(facts[runner.rank])
    runner.run_on_all_ranks("connect", lambda: network.connect(runner, device))
    count = megabytes * (1 << 20) // 4
    reduced = runner.run_on_all_ranks("all-reduce", lambda: network.all_reduce_seconds(count, runner, device))
    timed = runner.run_on_all_ranks("links", lambda: network.link_seconds(count, runner, device))
    links = {(left, int(right)): seconds for left, ends in enumerate(timed) for right, seconds in ends.items()}
    _print(runner, _speeds(megabytes, max(reduced), links, facts))
    return problems + network.link_problems(links, facts)


def _print(runner: RankRunner, text: str) -> None:
    if runner.rank == 0:
        print(text, flush=True)


def _table(facts: list[dict[str, Any]], offsets: list[Any]) -> str:
    head = ["rank", *COLUMNS, "clock"]
    rows = [
        [str(rank), *(str(fact[column]) for column in COLUMNS), f"{ahead * 1e3:+.1f} ms (+- {half * 1e3:.1f})"]
        for rank, (fact, (ahead, half)) in enumerate(zip(facts, offsets, strict=True))
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    )


def _speeds(megabytes: int, reduced: float, links: dict[network.Link, float], facts: list[dict[str, Any]]) -> str:
    """Bandwidths in GB/s; an all-reduce's is that of its bytes x 2 (n - 1) / n, which each rank sends and receives."""
    size, n = megabytes * (1 << 20) / 1e9, len(facts)
    lines = [f"all-reduce of {megabytes} MiB: {reduced:.3g} s, {size * 2 * (n - 1) / n / reduced:.3g} GB/s"]
    for kind, times in network.by_kind(links, facts).items():
        (left, right), slowest = max(times.items(), key=lambda item: item[1])
        usual = median(times.values())
        lines.append(
            f"links {kind}: {size / usual:.3g} GB/s in the median of {len(times)}, the slowest {size / slowest:.3g} "
            f"GB/s between ranks {left} and {right}"
        )
    return "\n".join(lines)
