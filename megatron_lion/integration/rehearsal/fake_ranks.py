"""torch's fake process group: one process that takes part in the collectives of many ranks, without the others.

A collective returns at once. An all-reduce keeps this rank's value, an all-gather repeats it for every rank. What would
come from one other rank only, by broadcast or point to point, is zero.
"""

import os
import types
from typing import Any

import torch
import torch.distributed as dist

BACKEND = "fake"
GPUS_PER_NODE = 8


def start(rank: int, world_size: int) -> None:
    """Make this process rank ``rank`` of ``world_size`` ranks that do not exist, for good."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank % GPUS_PER_NODE),
        LOCAL_WORLD_SIZE=str(min(world_size, GPUS_PER_NODE)),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )
    dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=FakeStore())
    _make_every_group_fake()
    _receive_zeros(rank)


def is_active() -> bool:
    """Whether the other ranks of this process do not exist."""
    return dist.is_initialized() and dist.get_backend() == BACKEND


def _make_every_group_fake() -> None:
    """Also the groups for which Megatron names NCCL or gloo, and those with NCCL's options."""
    stock = dist.new_group

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **rest: Any
    ) -> Any:
        return stock(ranks, **rest)

    dist.new_group = dist.distributed_c10d.new_group = new_group  # type: ignore[assignment]
    if not hasattr(dist, "ProcessGroupNCCL"):  # torch for the CPU
        options = types.SimpleNamespace(Options=lambda **_: types.SimpleNamespace(config=types.SimpleNamespace()))
        dist.ProcessGroupNCCL = options  # type: ignore[assignment, misc]


def _receive_zeros(rank: int) -> None:
    """The fake group leaves a receive buffer as it was allocated, which may hold NaN or an index out of range."""
    stock_broadcast, stock_batch = dist.broadcast, dist.batch_isend_irecv

    def broadcast(tensor: torch.Tensor, src: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if src not in (None, rank):
            tensor.zero_()
        return stock_broadcast(tensor, src, *args, **kwargs)

    def batch_isend_irecv(operations: list[Any]) -> Any:
        for operation in operations:
            if operation.op is dist.irecv:
                operation.tensor.zero_()
        return stock_batch(operations)

    def receiving(stock: Any) -> Any:
        def receive(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            tensor.zero_()
            return stock(tensor, *args, **kwargs)

        return receive

    dist.broadcast, dist.recv = broadcast, receiving(dist.recv)
    dist.batch_isend_irecv = batch_isend_irecv  # type: ignore[assignment]
    dist.irecv = dist.distributed_c10d.irecv = receiving(dist.irecv)  # torch checks that an operation has its own
