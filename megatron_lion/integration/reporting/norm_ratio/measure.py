"""One round: run global batches forward and backward, and average their gradients."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lion.integration import console
from megatron_lion.integration.reporting import gradient_shards
from megatron_lion.stats import GradientRecord, GradientRound, round_prefixes

HEARTBEAT_SECONDS = 30.0
# Runs one global batch forward and backward and leaves the reduced gradients in the buffers. Returns this rank's share
# of the batch's mean loss, and the batch's weight.
RunBatch = Callable[[], tuple[float | Tensor, float]]


def measure_round(
    model_chunks: list[Any],
    optimizer: Any,
    config: Any,
    run_batch: RunBatch,
    *,
    batches: int,
    vocabulary: tuple[int, int],
    iteration: int,
    exact: bool = False,
) -> GradientRecord:
    """Measure the mean gradient of ``batches`` global batches.

    Issues each batch's own collectives, then one all-reduce of all the round's scalars over all ranks. Gradient buffers
    are zeroed before each batch: a reduce-scatter leaves other ranks' shards behind.

    Args:
        model_chunks: the model of this rank, wrapped in Megatron's DistributedDataParallel.
        optimizer: Megatron's.
        config: the model's.
        run_batch: called once for each batch.
        batches: how many.
        vocabulary: the tokenizer's number of words, and the padded number.
        iteration: for the line that reports progress.
        exact: the batches are the whole split, and nothing is drawn at random (:class:`stats.GradientRound`).

    Raises:
        LionError: where not every parameter was counted exactly once, or a batch counted no token.
    """
    shards = [shard for shard in gradient_shards.local_shards(model_chunks, optimizer, vocabulary) if shard.counted]
    measured = GradientRound(
        [shard.as_counted() for shard in shards],
        tags=gradient_shards.tags(config.num_layers),
        prefixes=round_prefixes(batches),
        exact=exact,
    )
    scale = 1.0 / float(optimizer.get_loss_scale())
    with _progress(iteration, batches) as show:
        for done in range(batches):
            for chunk in model_chunks:
                chunk.zero_grad_buffer()
            share, weight = run_batch()
            grads = [shard.gradient if scale == 1.0 else shard.gradient * scale for shard in shards]
            measured.add(grads, loss=share, weight=weight)
            show(done + 1)
    return measured.finish(
        all_reduce,
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
        expected=gradient_shards.expected_elements(model_chunks),
    )


def all_reduce(vector: torch.Tensor) -> None:
    """Sum a CPU vector over all ranks, in place."""
    on_device = vector.to(torch.cuda.current_device())
    torch.distributed.all_reduce(on_device)
    vector.copy_(on_device)


@contextlib.contextmanager
def _progress(iteration: int, batches: int) -> Iterator[Callable[[int], None]]:
    """A function to call after each batch: a bar on a terminal, elsewhere a line every half a minute, on rank 0."""
    start = last = time.monotonic()
    bar = sys.stdout.isatty() and torch.distributed.get_rank() == 0

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        left = (now - start) / done * (batches - done)
        text = f"norm ratio at iteration {iteration}: {done} of {batches} batches, about {left:.0f} s left"
        if bar:
            print(f"\r[{'#' * (20 * done // batches):<20}] {text}   ", end="", flush=True)
        elif now - last > HEARTBEAT_SECONDS and done < batches:
            last = now
            console.say(text)

    yield show
    if bar:
        print(flush=True)
