"""torch's fake process group: one process that takes part in the collectives of many ranks, without the others.

A collective returns at once. An all-reduce keeps this rank's value, an all-gather repeats it for every rank. What would
come from one other rank only, by broadcast or point to point, is zero.
"""

import functools
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

    def broadcast(stock: Any, tensor: torch.Tensor, src: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if src not in (None, rank):
            tensor.detach().zero_()
        return stock(tensor, src, *args, **kwargs)

    def receive(stock: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tensor.detach().zero_()
        return stock(tensor, *args, **kwargs)

    def all_to_all_single(
        stock: Any, output: torch.Tensor, input: torch.Tensor, *splits: Any, group: Any = None, **kwargs: Any
    ) -> Any:
        output.detach().zero_()
        if not input.numel():  # nothing to send, which the fake group refuses where something comes back
            one_each = output.new_zeros(dist.get_world_size(group))
            return stock(one_each, one_each.clone(), group=group, async_op=kwargs.get("async_op", False))
        kwargs = {name: _as_list(value) for name, value in kwargs.items()}
        return stock(output, input, *map(_as_list, splits), group=group, **kwargs)

    for name, wrapper in (("broadcast", broadcast), ("recv", receive), ("irecv", receive)):
        _wrap(name, wrapper)
    _wrap("all_to_all_single", all_to_all_single)


def _as_list(value: Any) -> Any:
    """Megatron leaves the split sizes on the CPU in tensors, which torch does not accept."""
    return value.tolist() if isinstance(value, torch.Tensor) and not value.is_floating_point() else value


def _wrap(name: str, wrapper: Any) -> None:
    """Replace a function of torch.distributed, also where torch itself looks it up."""
    replacement = functools.partial(wrapper, getattr(dist, name))
    for module in (dist, dist.distributed_c10d):
        setattr(module, name, replacement)
