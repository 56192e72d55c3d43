"""One rank of ``tools.benchmark.reduce_network``: reductions of gradients before a step and gathers after it, in turn.

Prints on rank 0 one JSON object: for each of them the median milliseconds of the slowest rank, and the bytes that left
this rank's network interface. Parameters are bf16.
"""

import argparse
import json
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist

import megatron_lion

megatron_lion.register()

from megatron.core.distributed.reduce_scatter_with_fp32_accumulation import (  # noqa: E402
    reduce_scatter_with_fp32_accumulation,
)

from megatron_lion.integration.exchange.bucket_reduction import BucketReduction  # noqa: E402
from megatron_lion.integration.exchange.levels import levels_of  # noqa: E402
from megatron_lion.kernels.reduce import choose_reduce  # noqa: E402
from tools.benchmark.exchange_rank import gathers, timed  # noqa: E402

CODES = ("int4", "ternary")


def reductions(numel: int) -> dict[str, Callable[[], None]]:
    """Every way to reduce the gradient of one bucket, as the distributed optimizer does."""
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank()))
    shard = numel // dist.get_world_size()
    first = dist.get_rank() * shard
    half = gradient.bfloat16()
    levels, kernels = levels_of(dist.group.WORLD), choose_reduce("auto", torch.device("cpu"))
    param = torch.nn.Parameter(torch.empty(numel // 64, 64, device="meta"))

    def stock(values: torch.Tensor) -> None:
        dist.reduce_scatter_tensor(values[first : first + shard], values)

    def packed(code: str) -> Callable[[], None]:
        bucket = SimpleNamespace(grad_data=gradient.clone())
        reduction = BucketReduction(bucket, {param: 0}, levels, kernels, code=code, feedback="int8")
        return lambda: reduction.start(dist.ReduceOp.SUM, async_op=False).finish()

    def accumulated() -> None:
        owned = half[first : first + shard]
        handle = reduce_scatter_with_fp32_accumulation(owned, half, dist.ReduceOp.SUM, dist.group.WORLD, True)
        handle.wait()

    stock_arms = {"fp32": lambda: stock(gradient), "bf16": lambda: stock(half), "fp32 accumulation": accumulated}
    return {**stock_arms, **{code: packed(code) for code in CODES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=3_840_000)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    unit = 320 * dist.get_world_size()
    parameters = args.parameters // unit * unit
    arms = {**reductions(parameters), **gathers(torch.bfloat16, parameters, exceptions=0.0025)}
    found = timed(arms, args.repeats)
    if dist.get_rank() == 0:
        print(json.dumps({**found, "parameters": parameters}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
