"""One round: global batches forward and backward through Megatron's schedule, their gradients into a mean."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_lion.integration import console
from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.reporting import gradient_shards
from megatron_lion.integration.reporting.norm_ratio import round_data
from megatron_lion.integration.reporting.norm_ratio.loss import BatchLoss
from megatron_lion.stats import GradientRecord, GradientRound, round_prefixes

HEARTBEAT_SECONDS = 30.0


def run_round(step: Step, datasets: list[Any], batches: int, iteration: int) -> tuple[GradientRecord, int]:
    """Measure the mean gradient of ``batches`` global batches; returns the record and the number of tokens read.

    Issues each batch's own collectives, then one all-reduce of all the round's scalars over all ranks.

    Args:
        step: the training step whose model, optimizer and schedule are used.
        datasets: this rank's training dataset for each model chunk; empty where another rank reads for it.
        batches: how many.
        iteration: which batches are drawn, together with Megatron's seed.

    Raises:
        LionError: where not every parameter was counted exactly once, or a batch counted no token.
    """
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    vocabulary = (get_tokenizer().vocab_size, args.padded_vocab_size)
    shards = [shard for shard in gradient_shards.local_shards(step.model, step.optimizer, vocabulary) if shard.counted]
    measured = GradientRound(
        [shard.as_counted() for shard in shards],
        tags=gradient_shards.tags(args.num_layers),
        prefixes=round_prefixes(batches),
    )
    iterator, samples = own_iterator(step, datasets, batches, iteration)
    scale = 1.0 / float(step.optimizer.get_loss_scale())
    loss = BatchLoss(step.config)
    forward_step = loss.recording(step.forward_step_func)
    with loss.tokens_counted(), _progress(iteration, batches) as show:
        for done in range(batches):
            forward_backward(step, forward_step, iterator)
            grads = [shard.gradient if scale == 1.0 else shard.gradient * scale for shard in shards]
            share, weight = loss.take()
            measured.add(grads, loss=share, weight=weight)
            show(done + 1)
    record = measured.finish(
        all_reduce,
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
        expected=gradient_shards.expected_elements(step.model),
    )
    return record, samples * args.seq_length


def own_iterator(step: Step, datasets: list[Any], batches: int, iteration: int) -> tuple[Any, int]:
    """An iterator over the micro-batches of ``batches`` global batches, and the number of samples in all of them."""
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    args = get_args()
    dp_size = mpu.get_data_parallel_world_size()
    samples = batches * get_num_microbatches() * args.micro_batch_size * dp_size
    size = next((len(dataset) for dataset in datasets if dataset is not None), 1)
    indices = round_data.micro_batches(
        round_data.draw_indices(size, seed=args.seed, iteration=iteration, count=samples),
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=dp_size,
    )
    return round_data.iterators(datasets, step.data_iterator, indices, args), samples


def forward_backward(step: Step, forward_step: Callable[..., Any], iterator: Any) -> None:
    """One global batch through Megatron's schedule, as its training step runs it. Leaves the reduced gradients in the
    buffers, which are zeroed first: a reduce-scatter leaves other ranks' shards behind."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    args = get_args()
    for chunk in step.model:
        chunk.zero_grad_buffer()
    step.forward_backward_func(
        forward_step_func=forward_step,
        data_iterator=iterator,
        model=step.model,
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=False,
        **step.schedule_options,
    )


def all_reduce(vector: torch.Tensor) -> None:
    """Sum a vector that lies on the CPU over all ranks, in place."""
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
