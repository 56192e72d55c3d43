"""One round in Megatron's loop: its batches run through Megatron's schedule, as those of training do."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lion.config import ALL_BATCHES
from megatron_lion.integration import compat
from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.reporting.norm_ratio import round_data
from megatron_lion.integration.reporting.norm_ratio.loss import BatchLoss
from megatron_lion.integration.reporting.norm_ratio.measure import measure_round
from megatron_lion.integration.reporting.norm_ratio.round_data import Batches
from megatron_lion.stats import GradientRecord


def run_round(
    step: Step, datasets: list[Any], batches: int | Literal["all"], iteration: int
) -> tuple[GradientRecord, int]:
    """:func:`measure_round` with the loop's batches; returns the record and the number of tokens read.

    Args:
        step: the training step. Its model, optimizer and schedule are used.
        datasets: this rank's training dataset for each model chunk; empty where another rank reads for it. One
            epoch of it for ``all``.
        batches: how many; ``all`` for those of the whole dataset, each sample once.
        iteration: which batches are drawn, together with Megatron's seed.
    """
    from megatron.core import parallel_state as mpu
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    rank, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    is_whole = batches == ALL_BATCHES
    if batches == ALL_BATCHES:
        parts = round_data.whole_split(_samples(datasets), *_batch_sizes(), args.micro_batch_size)
    else:
        parts = [drawn(datasets, batches, iteration)]
    loss = BatchLoss(step.config)
    forward_step = loss.recording(step.forward_step_func)
    iterators = [own_iterator(step, datasets, part, iteration) for part in parts]
    queue = [(part, iterator, number) for part, iterator in zip(parts, iterators, strict=True) for number in part]

    def run_batch() -> tuple[float | Tensor, float]:
        part, iterator, number = queue.pop(0)
        real = part.samples_in(number)
        if real < part.size:
            loss.scale_next(part.factors(number, rank, replicas))
        with compat.temporarily(args, micro_batch_size=part.micro_batch_size):
            forward_backward(step, forward_step, iterator)
        share, weight = loss.take()
        return share, weight * (real if is_whole and not step.config.calculate_per_token_loss else 1)

    with loss.tokens_counted():
        record = measure_round(
            step.model,
            step.optimizer,
            step.config,
            run_batch,
            batches=len(queue),
            vocabulary=(get_tokenizer().vocab_size, args.padded_vocab_size),
            iteration=iteration,
            exact=is_whole and not (step.config.hidden_dropout or step.config.attention_dropout),
        )
    return record, sum(part.samples for part in parts) * args.seq_length


def drawn(datasets: Sequence[Any], batches: int, iteration: int) -> Batches:
    """``batches`` global batches of random samples."""
    from megatron.training import get_args

    args, (size, _) = get_args(), _batch_sizes()
    indices = round_data.draw_indices(
        next((len(dataset) for dataset in datasets if dataset is not None), 1),
        seed=args.seed,
        iteration=iteration,
        count=batches * size,
    )
    return Batches(indices=indices, size=size, micro_batch_size=args.micro_batch_size)


def _batch_sizes() -> tuple[int, int]:
    """Samples in a global batch, and in one with as many micro-batches of one sample."""
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    parts = get_num_microbatches() * mpu.get_data_parallel_world_size()
    return parts * get_args().micro_batch_size, parts


def _samples(datasets: Sequence[Any]) -> int:
    """Samples of the dataset, on every rank: some have no dataset. Issues one all-reduce."""
    known = [len(dataset) for dataset in datasets if dataset is not None]
    count = torch.tensor(max(known, default=0), dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return int(count)


def own_iterator(step: Step, datasets: Sequence[Any], batches: Batches, iteration: int) -> Any:
    """An iterator over this rank's micro-batches of ``batches``, for the round after ``iteration``.

    The pipeline stages that read a sample have the same data-parallel rank, so random draws in their workers agree.
    """
    from megatron.core import parallel_state as mpu
    from megatron.training import get_args

    args, rank = get_args(), mpu.get_data_parallel_rank()
    indices = round_data.micro_batches(
        batches.filled_up(),
        micro_batch_size=batches.micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=mpu.get_data_parallel_world_size(),
    )
    return round_data.iterators(datasets, step.data_iterator, indices, args, seed=(args.seed, iteration, rank))


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
