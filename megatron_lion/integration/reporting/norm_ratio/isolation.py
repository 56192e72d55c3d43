"""Forward and backward passes during training that do not change it."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch

from megatron_lion.integration import compat
from megatron_lion.integration.exchange.block_reduce import exact_gradients


@contextlib.contextmanager
def isolated(model_chunks: list[Any], optimizer: Any, config: Any, *, stepped: bool) -> Iterator[None]:
    """Restore on leaving, bit for bit, everything that the passes inside change in training.

    Restored: the random states of Python, numpy, torch, the device and Megatron's tracker; the model's buffers (for
    example a router's expert bias); the mixture-of-experts metrics; the rerun state machine, which is off. Parameters
    are gathered first if their all-gather overlaps with the forward pass, and its hooks are off inside, as in
    Megatron's own evaluation. Gradients are not compressed. Gradient buffers are zeroed, as each step begins by zeroing
    them. Issues the collectives of that all-gather.

    Args:
        model_chunks: the model of this rank, wrapped in Megatron's DistributedDataParallel.
        optimizer: Megatron's.
        config: the model's, which the schedule reads.
        stepped: whether this process has made an optimizer step, after which parameters may wait for their gather.
    """
    with (
        _parameters_gathered(model_chunks, optimizer, stepped=stepped),
        compat.temporarily(config, timers=None, param_sync_func=None),
        compat.rerun_disabled(),
        exact_gradients(optimizer),
        compat.moe_metrics_kept(),
        restore_buffers(model_chunks),
        restore_random_states(),
    ):
        try:
            yield
        finally:
            for chunk in model_chunks:
                chunk.zero_grad_buffer()


@contextlib.contextmanager
def _parameters_gathered(model_chunks: list[Any], optimizer: Any, *, stepped: bool) -> Iterator[None]:
    ddp_config = model_chunks[0].ddp_config
    if compat.uses_megatron_fsdp(model_chunks):  # it gathers before each module runs, in evaluation too
        yield
        return
    overlapped = ddp_config.use_distributed_optimizer and ddp_config.overlap_param_gather
    # Megatron itself keeps the hooks off until the first step of a process is over.
    hooked = overlapped and len(model_chunks[0].remove_forward_pre_hook_handles) > 0
    if hooked or (overlapped and stepped):
        compat.gather_parameters(model_chunks, optimizer, hooked=hooked)
    try:
        yield
    finally:
        if hooked:
            for chunk in model_chunks:
                chunk.enable_forward_pre_hook()


@contextlib.contextmanager
def restore_buffers(model_chunks: list[Any]) -> Iterator[None]:
    # Of the module inside: DistributedDataParallel has gradient buffers by this name.
    kept = [(buffer, buffer.clone()) for chunk in model_chunks for buffer in chunk.module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextlib.contextmanager
def restore_random_states() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with compat.forked_random_states():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
