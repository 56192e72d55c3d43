"""Measure clock offsets, all-reduce time and the links between neighbors."""

import os
import time
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from megatron_lion.cli.cluster.rank_facts import describe_ranks
from megatron_lion.cli.cluster.rank_runner import RankRunner
from megatron_lion.config import LionError

REPEATS = 3
SLOW = 10.0
"""How many times slower than the median of its kind a link may be. Ordinary networks differ by less."""
Link = tuple[int, int]


def clock_offset(runner: RankRunner) -> tuple[float, float]:
    """Seconds that this rank's clock is ahead of rank 0's, and the uncertainty: half the fastest round trip.

    Rank 0 answers one rank after the other through the store; (0, 0) on rank 0.
    """
    store = runner.store
    if runner.rank == 0:
        for rank in range(1, runner.size):
            for repeat in range(REPEATS):
                store.get(f"clock?/{rank}/{repeat}")
                store.set(f"clock!/{rank}/{repeat}", repr(time.time()))
        return 0.0, 0.0
    trips = []
    for repeat in range(REPEATS):
        sent = time.time(), time.monotonic()
        store.set(f"clock?/{runner.rank}/{repeat}", "")
        theirs = float(store.get(f"clock!/{runner.rank}/{repeat}"))
        half = (time.monotonic() - sent[1]) / 2
        trips.append((half, sent[0] + half - theirs))
    uncertain, ahead = min(trips)
    return ahead, uncertain


def connect(runner: RankRunner, device: torch.device) -> None:
    """Join all ranks in one process group, NCCL on GPUs and gloo otherwise, and try it with one all-reduce.

    Its time-out is half that of the runner, so that a waiting rank can still report which rank is missing.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("group", runner.store), rank=runner.rank, world_size=runner.size,
        timeout=timedelta(seconds=runner.timeout / 2),
    )  # fmt: skip
    _all_reduce(1, runner, device)


def all_reduce_seconds(count: int, runner: RankRunner, device: torch.device) -> float:
    """Seconds of the fastest of ``REPEATS`` fp32 all-reduces of ``count`` elements, each checked."""
    return min(_all_reduce(count, runner, device) for _ in range(REPEATS))


def _all_reduce(count: int, runner: RankRunner, device: torch.device) -> float:
    """Seconds of one all-reduce. Raises LionError where the sum is wrong."""
    data = torch.full((count,), float(runner.rank + 1), device=device)
    _synchronize(device)
    begin = time.monotonic()
    dist.all_reduce(data)
    _synchronize(device)
    seconds = time.monotonic() - begin
    expected = runner.size * (runner.size + 1) / 2
    if not bool((data == expected).all()):
        raise LionError(f"the sum of {count} elements over {runner.size} ranks is wrong: not {expected} in each")
    return seconds


def link_seconds(count: int, runner: RankRunner, device: torch.device) -> dict[str, float]:
    """Seconds that ``count`` fp32 elements take from this rank to the next of the ring; one pair after the other.

    Half the fastest round trip, measured by the lower end of each link: {"next rank": seconds}, {} where the ring of
    two has no second link.
    """
    found = {}
    for left, right in ring(runner.size):
        if runner.rank in (left, right):
            other = right if runner.rank == left else left
            try:
                trips = [
                    _round_trip(count, first=runner.rank == left, other=other, device=device) for _ in range(REPEATS)
                ]
            except RuntimeError as error:
                raise LionError(f"no answer from rank {other}: {str(error).splitlines()[0]}") from error
            if runner.rank == left:
                found[str(right)] = min(trips) / 2
    return found


def ring(size: int) -> list[Link]:
    """Pairs of neighboring ranks, and the last with the first if that is another pair."""
    return [(rank, (rank + 1) % size) for rank in range(size if size > 2 else size - 1)]


def _round_trip(count: int, *, first: bool, other: int, device: torch.device) -> float:
    data = torch.zeros(count, device=device)
    _synchronize(device)
    begin = time.monotonic()
    for sending in (first, not first):
        dist.send(data, other) if sending else dist.recv(data, other)
    _synchronize(device)
    return time.monotonic() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_kind(links: dict[Link, float], facts: list[dict[str, Any]]) -> dict[str, dict[Link, float]]:
    """The links inside a node and those between nodes, separately."""
    found: dict[str, dict[Link, float]] = {}
    for (left, right), seconds in links.items():
        kind = "within a node" if facts[left]["node"] == facts[right]["node"] else "between nodes"
        found.setdefault(kind, {})[left, right] = seconds
    return found


def link_problems(links: dict[Link, float], facts: list[dict[str, Any]]) -> list[str]:
    """A sentence for every link slower than ``SLOW`` times its kind's median, or for a rank with two such links."""
    found = []
    for kind, times in by_kind(links, facts).items():
        usual = median(times.values())
        slow = {link: seconds for link, seconds in times.items() if seconds > SLOW * usual}
        both = {end for link in slow for end in link if sum(end in other for other in slow) > 1}
        for rank in sorted(both):
            found.append(
                f"{describe_ranks([rank], facts)}: each of its links {kind} takes over {SLOW:g} times the median"
            )
        for (left, right), seconds in slow.items():
            if not both & {left, right}:
                found.append(
                    f"{describe_ranks([left, right], facts)}: the link between them takes "
                    f"{seconds / usual:.0f} times the median {kind}"
                )
    return found


def device_of_rank(facts: dict[str, Any]) -> torch.device:
    """Where this rank's tensors go; makes its GPU the current one."""
    if facts["device"] == "CPU":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
