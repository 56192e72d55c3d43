"""One round in Megatron's loop: its batches run through Megatron's schedule, as those of training do."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.reporting.norm_ratio import round_data
from megatron_lion.integration.reporting.norm_ratio.loss import BatchLoss
from megatron_lion.integration.reporting.norm_ratio.measure import measure_round
from megatron_lion.stats import GradientRecord


def run_round(step: Step, datasets: list[Any], batches: int, iteration: int) -> tuple[GradientRecord, int]:
    """:func:`measure_round` with the loop's batches; returns the record and the number of tokens read.

    Args:
        step: the training step. Its model, optimizer and schedule are used.
        datasets: this rank's training dataset for each model chunk; empty where another rank reads for it.
        batches: how many.
        iteration: which batches are drawn, together with Megatron's seed.
    """
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    iterator, samples = own_iterator(step, datasets, batches, iteration)
    loss = BatchLoss(step.config)
    forward_step = loss.recording(step.forward_step_func)

    def run_batch() -> tuple[float | Tensor, float]:
        forward_backward(step, forward_step, iterator)
        return loss.take()

    with loss.tokens_counted():
        record = measure_round(
            step.model,
            step.optimizer,
            step.config,
            run_batch,
            batches=batches,
            vocabulary=(get_tokenizer().vocab_size, args.padded_vocab_size),
            iteration=iteration,
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
    buffers, which must be zero."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    args = get_args()
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
