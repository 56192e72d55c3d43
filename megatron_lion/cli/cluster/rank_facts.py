"""Versions, device and clock of each rank, and the ranks that differ from the others."""

import os
import platform
import socket
from collections import Counter
from typing import Any

import torch

from megatron_lion.cli.doctor import version_of
from megatron_lion.integration import compat
from megatron_lion.integration.cpu import torch_cuda
from megatron_lion.version import __version__

CLOCK_SECONDS = 1.0
"""How far a clock may be from rank 0's. torchrun takes nodes for dead by the time stamps of their signs of life."""
SAME_EVERYWHERE = (
    "python", "torch", "cuda", "nccl", "megatron-core", "transformer-engine", "megatron-lion", "device", "gpus",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Versions, machine and device of this process, as values for JSON. None: not installed."""
    on_gpu = torch.cuda.is_available() and not torch_cuda.wanted()
    local = int(os.environ["LOCAL_RANK"])
    visible = torch.cuda.device_count() if on_gpu else 0
    mine = torch.cuda.get_device_properties(local) if local < visible else None
    return {
        "machine": socket.gethostname(),
        "node": int(os.environ.get("GROUP_RANK", "0")),
        "local": local,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,  # type: ignore[no-untyped-call]
        "megatron-core": compat.megatron_version(),
        "transformer-engine": version_of("transformer-engine"),
        "megatron-lion": __version__,
        "device": f"{mine.name}, {mine.total_memory >> 30} GiB" if mine else "no GPU" if on_gpu else "CPU",
        "gpus": visible,
        "gpu": str(mine.uuid) if mine else None,
    }


def mismatches(facts: list[dict[str, Any]]) -> list[str]:
    """A sentence for every value that differs from most ranks' value. In a tie rank 0's value is the usual one."""
    found = []
    for key in SAME_EVERYWHERE:
        counts = Counter(str(fact[key]) for fact in facts)
        usual = max(counts, key=lambda value: (counts[value], value == str(facts[0][key])))
        for value in sorted(counts.keys() - {usual}):
            ranks = [rank for rank, fact in enumerate(facts) if str(fact[key]) == value]
            found.append(
                f"{describe_ranks(ranks, facts)}: {key} is {value}, {usual} on {counts[usual]} of {len(facts)} ranks"
            )
    return found


def gpu_problems(facts: list[dict[str, Any]]) -> list[str]:
    """A sentence for every rank without its own GPU, if ranks are on GPUs."""
    found = [
        f"{describe_ranks([rank], facts)}: local rank {fact['local']} has no GPU, {fact['gpus']} are visible there: "
        "lower --nproc-per-node, or correct CUDA_VISIBLE_DEVICES"
        for rank, fact in enumerate(facts)
        if fact["device"] == "no GPU"
    ]
    sharing = Counter(fact["gpu"] for fact in facts if fact["gpu"])
    for gpu, count in sharing.items():
        if count > 1:
            ranks = [rank for rank, fact in enumerate(facts) if fact["gpu"] == gpu]
            found.append(f"{describe_ranks(ranks, facts)}: all on one GPU ({gpu}): correct CUDA_VISIBLE_DEVICES")
    return found


def clock_problems(offsets: list[tuple[float, float]], facts: list[dict[str, Any]]) -> list[str]:
    """A sentence for every clock that is off rank 0's by more than ``CLOCK_SECONDS`` and half its round trip.

    ``offsets`` are seconds ahead of rank 0, and half the time that the question took.
    """
    return [
        f"{describe_ranks([rank], facts)}: its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} "
        "rank 0's: let the nodes keep time (NTP)"
        for rank, (ahead, uncertain) in enumerate(offsets)
        if abs(ahead) > CLOCK_SECONDS + uncertain
    ]


def describe_ranks(ranks: list[int], facts: list[dict[str, Any]]) -> str:
    """``ranks 4, 5 (node 1, node7)``: with node and machine if all share them."""
    where = {(facts[rank]["node"], facts[rank]["machine"]) for rank in ranks}
    place = ", ".join(f"node {node}, {machine}" for node, machine in sorted(where))
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} ({place})"
