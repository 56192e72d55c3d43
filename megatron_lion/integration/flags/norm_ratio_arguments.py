"""The ``--norm-ratio-*`` flags on Megatron's command line, and the settings that they do not support."""

import argparse
from pathlib import Path
from typing import Any, Literal

from megatron_lion.config import ALL_BATCHES, LionError, NormRatioOptions

FLAGS = ("norm_ratio_interval", "norm_ratio_batches", "norm_ratio_file", "norm_ratio_at_start")
OPTIMIZERS = ("lion", "sgd", "adam")

# Settings with which a round would be wrong, or would change training. The value is why, and what to do.
REFUSED = {
    "use_torch_fsdp2": "torch FSDP2 keeps gradients in its own tensors. Use --use-distributed-optimizer",
    "fp8": "a forward pass in fp8 changes the scales that training uses. Remove --fp8-format",
    "fp4": "a forward pass in fp4 changes the scales that training uses. Remove --fp4-format",
    "mtp_num_layers": "multi-token prediction has losses and an embedding copy that are not counted. Remove the flag",
    "hybrid_context_parallel": "it has its own loader, which cuts the batches. Remove the flag",
    "perform_rl_step": "reinforcement learning generates its batches. Remove the flag",
    "skip_train": "without training there is nothing to measure. Remove the flag",
    "moe_expert_rank_capacity_factor": "its schedule repeats batches that overflow. Remove the flag",
    "modelopt_enabled": "distillation needs a teacher's shapes in every pass. Remove the flag",
}
# Derived by Megatron from the flag on the right.
WEIGHT_SHARDS = {
    "gtp_weight_remat_size": "--tensor-parallel-num-weight-shards",
    "expert_gtp_weight_remat_size": "--expert-tensor-parallel-num-weight-shards",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    group = parser.add_argument_group("norm ratio", "The gradient's l1/l2, measured with the parameters held fixed.")
    group.add_argument(
        "--norm-ratio-interval",
        type=int,
        default=NormRatioOptions.interval,
        metavar="N",
        help="After every N iterations run further global batches forward and backward, with the parameters held "
        "fixed, and record ||g||_1 / ||g||_2 of the mean gradient g. 0 is off (default: %(default)s).",
    )
    group.add_argument(
        "--norm-ratio-batches",
        type=_batches,
        default=None,
        metavar="B",
        help=f"Global batches of a round (default: {NormRatioOptions.batches}), or {ALL_BATCHES!r}: the whole training "
        "split, each sample once, so that loss and gradient are exact.",
    )
    group.add_argument(
        "--norm-ratio-file",
        default=None,
        metavar="FILE",
        help=f"Where each round is appended as one line of JSON (default: {NormRatioOptions.file} in --save, else in "
        "--tensorboard-dir, else in the working directory).",
    )
    group.add_argument(
        "--norm-ratio-at-start",
        action="store_true",
        help="Measure before the first iteration too, unless the file already has a round: a resumed run does not.",
    )


def _batches(text: str) -> int | Literal["all"]:
    """The value of ``--norm-ratio-batches``; argparse reports the error."""
    try:
        return ALL_BATCHES if text == ALL_BATCHES else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or {ALL_BATCHES!r}, got {text!r}") from None


def options_from(args: Any) -> NormRatioOptions:
    """The flags as options. Raises LionError for invalid values."""
    # --yaml-cfg, which is refused, makes arguments without these.
    batches, file = getattr(args, "norm_ratio_batches", None), getattr(args, "norm_ratio_file", None)
    folder = getattr(args, "save", None) or getattr(args, "tensorboard_dir", None) or "."
    return NormRatioOptions(
        interval=getattr(args, "norm_ratio_interval", NormRatioOptions.interval),
        at_start=getattr(args, "norm_ratio_at_start", NormRatioOptions.at_start),
        batches=NormRatioOptions.batches if batches is None else batches,
        file=file or str(Path(folder) / NormRatioOptions.file),
    )


def check(args: Any) -> None:
    """Raise LionError for settings that a round does not support, and for flags without effect. May be called again."""
    if not options_from(args).is_on:
        given = [dest for dest in FLAGS if getattr(args, dest) not in (0, None, False)]
        if given:
            raise LionError(f"--{given[0].replace('_', '-')} has no effect without --norm-ratio-interval N")
        return
    if args.optimizer not in OPTIMIZERS:
        raise LionError(
            f"the norm ratio is measured with --optimizer {', '.join(OPTIMIZERS)}, not with {args.optimizer}: remove "
            "--norm-ratio-interval or change the optimizer"
        )
    refused = {f"--{dest.replace('_', '-')}": why for dest, why in REFUSED.items() if getattr(args, dest, None)}
    if getattr(args, "cuda_graph_impl", "none") != "none":
        refused[f"--cuda-graph-impl {args.cuda_graph_impl}"] = (
            "a captured graph runs with the buffers and the schedule of training. Remove the flag"
        )
    if args.dataloader_type == "external":
        refused["--dataloader-type external"] = (
            "a round draws its batches from an indexed dataset. Use single or cyclic"
        )
    if options_from(args).batches == ALL_BATCHES:
        refused |= _refused_with_all(args)
    for dest, flag in WEIGHT_SHARDS.items():
        if getattr(args, dest, 1) > 1:
            refused[flag] = "its shards of weights are not counted. Remove the flag"
    for flag, why in refused.items():
        raise LionError(f"{flag} is not supported with the norm ratio: {why}, or remove --norm-ratio-interval")


def _refused_with_all(args: Any) -> dict[str, str]:
    """Settings with which the training loss of a whole split is not a mean over samples, and why."""
    refused = {}
    coefficients = getattr(args, "moe_aux_loss_coeff", 0.0) or 0.0
    weight = sum(coefficients) if isinstance(coefficients, list) else coefficients
    if getattr(args, "num_experts", None) and (weight or getattr(args, "moe_z_loss_coeff", None)):
        refused["--norm-ratio-batches all"] = (
            "routers' auxiliary losses are of a micro-batch, not of a sample. Set a number of batches, or "
            "--moe-aux-loss-coeff 0 and no --moe-z-loss-coeff"
        )
    return refused
