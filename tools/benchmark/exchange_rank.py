"""One rank of ``tools.benchmark.exchange_network``: the gather after a step, in parameters and in signs, in turn.

Prints on rank 0 one JSON object for each kind of parameters: the median milliseconds of both gathers, and the bytes
that left this rank's network interface in one of each, as its counters have it.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_lion.exchange.digits import EXCEPTION
from megatron_lion.integration.exchange.bucket_signs import BucketSigns, Span
from megatron_lion.kernels.exchange import choose_exchange

KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
RATES = [(1e-6, 0.1)]


def sent_bytes() -> int:
    """Bytes that this machine's, or namespace's, interface has sent."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def one_gather(gather: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds of the slowest rank, and bytes sent from here."""
    dist.barrier()
    before, start = sent_bytes(), time.perf_counter()
    gather()
    taken = torch.tensor(1e3 * (time.perf_counter() - start))
    dist.barrier()  # what the others wait for may still be on its way
    sent = sent_bytes() - before
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item(), sent


def gathers(dtype: torch.dtype, parameters: int, exceptions: float) -> dict[str, Callable[[], None]]:
    """Both ways to gather one bucket after a step, as the distributed optimizer does."""
    params = (torch.randn(parameters, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    kernels = choose_exchange("auto", torch.device("cpu"))
    bucket = SimpleNamespace(param_data=params)
    signs = BucketSigns(bucket, [Span(0, parameters, 0)], dist.group.WORLD, kernels, half_away=False)
    step = torch.randint(0, 2, (signs.numel,), dtype=torch.uint8)
    if dtype != torch.float32:
        step.masked_fill_(torch.rand(signs.numel) < exceptions, EXCEPTION)

    first = signs.rank * signs.numel

    def in_full() -> None:
        dist.all_gather_into_tensor(params, signs.shard)

    def in_signs() -> None:
        signs.begin_step()
        signs.digits(first, first + signs.numel).copy_(step)
        most = signs.count_exceptions()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        signs.prepare(RATES, signs.forms(most.tolist()))
        signs.gather().replay()

    return {"params": in_full, "signs": in_signs}


def timed(exchanges: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of ``exchanges``, each made ``repeats`` times in turn: "ms", and the "bytes" sent from here."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in exchanges}
    for repeat in range(repeats + 1):
        for name, exchange in exchanges.items():
            measured = one_gather(exchange)
            if repeat:  # the first one opens connections
                found[name].append(measured)
    return {
        "ms": {name: statistics.median(ms for ms, _ in runs) for name, runs in found.items()},
        "bytes": {name: statistics.median(count for _, count in runs) for name, runs in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=3_840_000)
    parser.add_argument("--exceptions", type=float, default=0.0025)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parameters = args.parameters // dist.get_world_size() * dist.get_world_size()
    for name, dtype in KINDS.items():
        found = timed(gathers(dtype, parameters, args.exceptions), args.repeats)
        if dist.get_rank() == 0:
            print(json.dumps({"kind": name, **found, "parameters": parameters}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
