"""Score windows with a GPT that Megatron builds and loads, at any tensor x pipeline x data parallel size."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.integration.loop.pretrain import require_a_loop_that_builds_gpt

from .model_args import default_args, function_args
from .windows import Window

ROWS_AT_A_TIME = 256
TOKENIZER_ARGS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")


def chosen_tokenizer(given: Any, saved: Any) -> dict[str, Any]:
    """The tokenizer's arguments: all of the command line's where it names a type, else all of the checkpoint's."""
    source = saved if given.tokenizer_type is None else given
    return {name: getattr(source, name, None) for name in TOKENIZER_ARGS}


def models_own(given: Any, saved: Any) -> dict[str, Any]:
    """The arguments that decide the model's function, as the checkpoint has them.

    Raises LionError where the command line asks for another function.
    """
    usual = default_args()
    own = {name: getattr(saved, name) for name in function_args(saved)}
    for name, value in own.items():
        asked = getattr(given, name, None)
        if asked not in (value, getattr(usual, name, None)):
            raise LionError(
                f"--{name.replace('_', '-')} {asked}: the checkpoint's model has {value}. Remove the flag: "
                "arguments that decide the model's function come from the checkpoint"
            )
    return own


def megatron_args(argv: list[str], checkpoints: Path, step: int, saved: Any) -> Any:
    """Parse Megatron's flags, complete them with the model's own and the tokenizer's, and make them Megatron's.

    The checkpoint decides everything about the model. ``argv`` has the layout, the precision and the machine, and may
    have other paths of the tokenizer's files. Raises LionError if the tensor-parallel size does not divide the
    vocabulary.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    sys.argv[1:] = [*argv, "--load", str(checkpoints), "--ckpt-step", str(step), "--no-load-optim", "--no-load-rng"]
    args = parse_args()
    args.exit_on_missing_checkpoint = True
    tokenizer, function = chosen_tokenizer(args, saved), models_own(args, saved)
    load_args_from_checkpoint(args)
    vars(args).update(tokenizer)  # Megatron took the type and the model from the checkpoint, but no vocabulary file
    vars(args).update(function)
    if args.padded_vocab_size % args.tensor_model_parallel_size:
        raise LionError(
            f"the checkpoint's {args.padded_vocab_size} vocabulary rows are not divisible by "
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: use a divisor"
        )
    validate_args(args, {})
    set_global_variables(args, build_tokenizer=False)
    return args


def build_model(args: Any) -> torch.nn.Module:
    """Return this rank's part of the GPT, without gradients. Raises LionError for a Megatron before 0.19."""
    require_a_loop_that_builds_gpt("evaluation")
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    config = gpt_config_from_args(args)
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (model,) = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    return model.eval().requires_grad_(False)


def load_weights(model: torch.nn.Module, args: Any, step: int) -> None:
    """Read the checkpoint of one step, from any layout, into the model. Collective."""
    from megatron.training.checkpointing import load_checkpoint

    args.ckpt_step = step
    load_checkpoint([model], None, None)


def token_losses(logits: Tensor, targets: Tensor, vocab_size: int | None) -> Tensor:
    """Return -ln softmax(logits)[target] in float64, from logits with the last axis divided over tensor-parallel ranks.

    Args:
        logits: [tokens, this rank's vocabulary rows]; padding in it is overwritten.
        targets: token numbers; [tokens].
        vocab_size: rows from this number on are padding and take no part in the softmax; None lets them.

    Three all-reduces over the tensor-parallel group, all of [tokens]. float64 is made of some hundred tokens' logits at
    a time, so that memory stays near that of the logits.
    """
    from megatron.core import mpu

    group = mpu.get_tensor_model_parallel_group()
    rows = logits.size(-1)
    first = rows * mpu.get_tensor_model_parallel_rank()
    if vocab_size is not None:
        logits[:, max(vocab_size - first, 0) :] = float("-inf")
    largest = logits.amax(-1).double()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    parts = zip(logits.split(ROWS_AT_A_TIME), largest.split(ROWS_AT_A_TIME), strict=True)
    sums = torch.cat([(part.double() - top.unsqueeze(-1)).exp().sum(-1) for part, top in parts])
    torch.distributed.all_reduce(sums, group=group)
    here = (targets >= first) & (targets < first + rows)
    picked = logits.gather(-1, ((targets - first) * here).unsqueeze(-1)).squeeze(-1).double()
    picked = torch.where(here, picked, torch.zeros_like(picked))
    torch.distributed.all_reduce(picked, group=group)
    return sums.log() + largest - picked


def batches(tokens: Tensor, windows: list[Window], length: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this data-parallel rank's micro-batches: inputs, targets, and whether a target is scored; [size, length].

    Whole micro-batches go round the data-parallel ranks, so their content does not depend on how many ranks there are.
    Padding of a short window or micro-batch is not scored, and causal attention does not see it. All ranks get the same
    number of micro-batches.
    """
    from megatron.core import mpu

    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    for begin in range(rank * size, -(-len(windows) // (size * ranks)) * size * ranks, size * ranks):
        inputs = torch.zeros(size, length, dtype=torch.int64)
        targets, scored = torch.zeros_like(inputs), torch.zeros(size, length, dtype=torch.bool)
        for row, window in enumerate(windows[begin : begin + size]):
            used = window.end - window.begin
            inputs[row, :used] = tokens[window.begin : window.end]
            targets[row, :used] = tokens[window.begin + 1 : window.end + 1]
            scored[row, used - window.scored : used] = True
        yield inputs, targets, scored


def score(
    model: torch.nn.Module,
    tokens: Tensor,
    windows: list[Window],
    *,
    length: int,
    micro_batch: int,
    vocab_size: int | None,
) -> tuple[float, int]:
    """Return the sum of all scored losses, and how many were scored, the same numbers on every rank.

    Runs Megatron's own pipeline schedule, forward only. Sums are float64; one all-reduce over all ranks at the end.
    """
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = next(model.parameters()).device
    positions = torch.arange(length, device=device).unsqueeze(0).expand(micro_batch, -1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
    mine = list(batches(tokens, windows, length, micro_batch))
    total = torch.zeros(2, dtype=torch.float64, device=device)

    def forward_step(iterator: Any, part: Any) -> tuple[Tensor, Any]:
        inputs, targets, scored = (value.to(device) for value in next(iterator))

        def add_losses(logits: Tensor, non_loss_data: bool = True) -> None:
            losses = token_losses(logits[scored], targets[scored], vocab_size)
            total[0] += losses.sum()
            total[1] += len(losses)

        return part(inputs, positions, mask), add_losses

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(mine),
            model=[model],
            num_microbatches=len(mine),
            seq_length=length,
            micro_batch_size=micro_batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if mpu.get_tensor_model_parallel_rank() != 0:
        total.zero_()  # its ranks have the same sums, as those of other pipeline stages have none
    torch.distributed.all_reduce(total)
    return float(total[0]), int(total[1])
