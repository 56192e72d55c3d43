"""Lion on Megatron's own command line: ``--optimizer lion``, ``--lion-beta1``, ``--lion-beta2``, and their checks."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from megatron_lion.config import KERNELS, LANGUAGE_MODEL_BETAS, LionConfig, LionError, did_you_mean
from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import formats, init_from_adam, ownership
from megatron_lion.integration.flags import norm_ratio_arguments as norm_ratio
from megatron_lion.integration.flags import state_precision
from megatron_lion.integration.reporting import step_telemetry

BETA_FLAGS = dict(zip(("lion_beta1", "lion_beta2"), LANGUAGE_MODEL_BETAS, strict=True))

# Flags that this version does not carry out with Lion, and what to do instead. Refused, never ignored.
REFUSED = {
    "use_megatron_fsdp": "Megatron-FSDP has its own optimizer state layout. Use --use-distributed-optimizer",
    "use_torch_fsdp2": "torch FSDP2 is not supported with Lion. Use --use-distributed-optimizer",
    "optimizer_cuda_graph": "a captured step would keep the first learning rate for ever. Drop the flag",
}


# Megatron's own default betas, which other optimizers keep: set when its parser is made.
_stock_betas: dict[str, Any] = {}


def add_megatron_arguments(stock: Callable[..., Any], parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser."""
    parser = stock(parser)
    _stock_betas.update(_adapt(parser))
    norm_ratio.add(parser)
    return parser


def validate_args(stock: Callable[..., Any], args: Any, defaults: dict[str, Any] | None = None) -> Any:
    """Check our flags, before and after Megatron checks its own."""
    import megatron.training.arguments as arguments

    _require_ranks(args)
    is_lion = args.optimizer == "lion"
    _fill_betas(args, BETA_FLAGS if is_lion else _stock_betas)
    norm_ratio.check(args)
    step_telemetry.check(args)
    if not is_lion:
        _refuse_without_lion(args)
        validated = stock(args, defaults or {})
        norm_ratio.check(args)  # again, as Megatron derives some settings from others
        return validated
    _check_lion(args)
    # Under its own name stock would turn --use-distributed-optimizer into a layer-wise optimizer (1671-1686); the
    # arguments are printed after the name is restored, so that the log tells the truth.
    with compat.temporarily(args, optimizer="sgd"), compat.temporarily(arguments, _print_args=lambda *_: None):
        validated = stock(args, defaults or {})
    norm_ratio.check(args)
    ownership.mark(args)
    arguments._print_args("arguments", args)
    return validated


def validate_yaml(stock: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Refuse ``--yaml-cfg``, which bypasses the checks above."""
    unchecked = "--optimizer lion" if getattr(args, "optimizer", None) == "lion" else None
    if norm_ratio.config_from(args).is_on:
        unchecked = unchecked or "--norm-ratio-interval"
    if unchecked:
        raise LionError(
            f"--yaml-cfg cannot be honoured with {unchecked}: it bypasses the checks of the command line. "
            "Give Megatron's flags instead"
        )
    return stock(args, *rest, **kwargs)


TRAINING = (
    compat.wrap("megatron.training.yaml_arguments:validate_yaml", validate_yaml, parameters=("args",)),
    compat.wrap("megatron.training.arguments:add_megatron_arguments", add_megatron_arguments, parameters=("parser",)),
    compat.wrap(
        "megatron.training.arguments:validate_args",
        validate_args,
        parameters=("args", "defaults"),
        uses=("_print_args",),
    ),
)


def _adapt(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Teach ``parser`` our names and errors. Returns Megatron's own default betas, which other optimizers keep."""
    options = {action.dest: action for action in parser._actions}
    optimizer = options["optimizer"]
    names = tuple(dict.fromkeys([*(optimizer.choices or ()), "lion"]))
    optimizer.choices = names

    def optimizer_name(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"{value!r} is not an optimizer: {did_you_mean(value, names)}")
        return value

    optimizer.type = optimizer_name
    stock_betas = {}
    for dest, ours in BETA_FLAGS.items():
        flag = f"--{dest.replace('_', '-')}"
        option = options.get(dest) or parser.add_argument(flag, type=float, help="Of Lion.")  # before 0.17 it has none
        stock_betas[dest], option.default = option.default, None
        option.help = f"{option.help} With --optimizer lion: {ours:g} unless given."

    parser.add_argument(
        "--lion-kernel",
        default="auto",
        metavar=f"{{{','.join(KERNELS)}}}",
        help="How Lion's step is computed; all give the same bits. Default: auto, the fastest that this machine has.",
    )

    state_precision.add(parser)
    step_telemetry.add(parser)

    parser.add_argument(
        "--lion-init-from",
        metavar=f"{{{','.join(init_from_adam.CHOICES)}}}",
        help="Where --load holds an Adam checkpoint, go on from its weights with Adam's momentum, or with none. "
        "Without it such a checkpoint is refused. No effect once the checkpoint is Lion's own.",
    )

    def error(message: str) -> None:
        raise LionError(f"{message}. All flags: --help")

    # argparse would print the message, and all of Megatron's usage, once for every rank.
    parser.error = error  # type: ignore[method-assign, assignment]
    return stock_betas


def _fill_betas(args: Any, defaults: dict[str, Any]) -> None:
    for dest, default in defaults.items():
        if getattr(args, dest, None) is None:
            setattr(args, dest, default)


def _check_lion(args: Any) -> None:
    for dest, instead in REFUSED.items():
        if getattr(args, dest, None):
            raise LionError(f"--{dest.replace('_', '-')} cannot be honoured with --optimizer lion: {instead}")
    formats.refuse_foreign_format(args)
    init_from_adam.check(args)
    if args.lr is None:
        raise LionError("--optimizer lion needs --lr, 3 to 10 times lower than AdamW's (docs/coming-from-adamw.md)")
    state_precision.resolve(args)
    LionConfig(
        lr=args.lr,
        weight_decay=args.weight_decay,
        betas=(args.lion_beta1, args.lion_beta2),
        kernel=args.lion_kernel,
        momentum_dtype=args.lion_momentum_dtype,
        master_weights=args.lion_master_weights,
    )
    if args.min_lr is not None and args.min_lr > args.lr:
        raise LionError(f"--min-lr {args.min_lr:g} lies above --lr {args.lr:g}: lower it with Lion's --lr")


def _refuse_without_lion(args: Any) -> None:
    if args.lion_init_from:
        raise LionError(
            f"--lion-init-from {args.lion_init_from} has no effect with --optimizer {args.optimizer}: drop it, or add "
            "--optimizer lion"
        )


def _require_ranks(args: Any) -> None:
    """Refuse a number of ranks that the model-parallel layout does not divide, saying how many would do."""
    layout = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
    }
    needed = layout["TP"] * layout["PP"] * layout["CP"]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % needed:
        sizes = " x ".join(f"{name} {size}" for name, size in layout.items() if size > 1)
        raise LionError(
            f"{sizes} needs a multiple of {needed} ranks, but {world_size} were started: use torchrun "
            f"--nproc-per-node {needed} (or a multiple), or lower --tensor-model-parallel-size, "
            "--pipeline-model-parallel-size or --context-parallel-size"
        )
