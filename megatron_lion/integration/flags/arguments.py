"""Lion on Megatron's command line: ``--optimizer lion``, the ``--lion-*`` flags, and their checks."""

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

from megatron_lion.config import KERNELS, LionError, LionOptions, check_data_prefix, check_rates
from megatron_lion.integration import compat, console, exit_signal
from megatron_lion.integration.checkpoint import formats, init_from_adam, ownership
from megatron_lion.integration.cpu import run_flags, torch_cuda
from megatron_lion.integration.exchange import refusals as exchange
from megatron_lion.integration.flags import exchange_arguments, state_precision
from megatron_lion.integration.flags import norm_ratio_arguments as norm_ratio
from megatron_lion.integration.optimizer import config_fields, fast_norm, muon_scalar, refusals
from megatron_lion.integration.rehearsal import fake_ranks
from megatron_lion.integration.reporting import step_telemetry
from megatron_lion.nearest import did_you_mean, hint

# Flags with prefixes of data sets, with or without weights.
DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def add_megatron_arguments(stock: Callable[..., Any], parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser."""
    parser = stock(parser)
    _adapt(parser)
    norm_ratio.add(parser)
    return parser


def validate_args(stock: Callable[..., Any], args: Any, defaults: dict[str, Any] | None = None) -> Any:
    """Check our flags, before and after Megatron checks its own. A run on the CPU first sets what it needs."""
    if torch_cuda.wanted() and not fake_ranks.is_active() and (flags := run_flags.apply(args)):
        console.say(f"{torch_cuda.DEVICE_VARIABLE}=cpu sets {' '.join(flags)}")
    _require_ranks(args)
    for dest in DATA:
        for word in getattr(args, dest, None) or ():
            check_data_prefix(f"--{dest.replace('_', '-')}", word)
    norm_ratio.check(args)
    step_telemetry.check(args)
    validated = (_validate_lion if args.optimizer == "lion" else _validate_another)(stock, args, defaults or {})
    norm_ratio.check(args)  # again, as Megatron derives some settings from others
    exit_signal.kill_daemons_at_exit(args)
    return validated


def _validate_another(stock: Callable[..., Any], args: Any, defaults: dict[str, Any]) -> Any:
    _refuse_options_of_lion(args)
    config_fields.fill_betas(args)
    return stock(args, defaults)


def _refuse_options_of_lion(args: Any) -> None:
    """Raise LionError for an option of Lion that has no effect with the optimizer of ``args``."""
    used = muon_scalar.options_used(args)
    for dest, (_, default) in config_fields.FIELDS.items():
        value = getattr(args, dest)
        if value not in (default, config_fields.stock_beta(dest)) and dest not in used:
            flag = f"--{dest.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise LionError(
                f"{flag} has no effect with --optimizer {args.optimizer}: remove it, or add --optimizer lion"
            )


def _validate_lion(stock: Callable[..., Any], args: Any, defaults: dict[str, Any]) -> Any:
    import megatron.training.arguments as arguments

    options = _settle(args)
    # The arguments are printed after the name is restored, so that the log tells the truth.
    with compat.as_sgd(args), compat.temporarily(arguments, _print_args=lambda *_: None):
        validated = stock(args, defaults)
    args.lion_rates_from_run = not args.use_checkpoint_opt_param_scheduler
    args.lion_saves_stacks = formats.saves_stacks(args)
    state_precision.pad_buckets_for_blocks(args, options)
    ownership.mark(args)
    arguments._print_args("arguments", args)
    return validated


def _settle(args: Any) -> LionOptions:
    """Check the command line, turn it into options and write these back, for Megatron's configuration to copy."""
    torch_cuda.require_device()
    if getattr(args, "use_megatron_fsdp", False):
        args.use_distributed_optimizer = True  # as Megatron sets it later
    refusals.refuse_flags(args)
    formats.refuse_foreign_format(args)
    check_rates(args.lr, args.weight_decay, args.min_lr)
    options = LionOptions.from_config(args)
    init_from_adam.check(args, options)
    state_precision.check(args, options)
    exchange.refuse_settings(options, args)
    options.write_to(args)
    if args.optimizer_cpu_offload:  # Megatron requires the flag of its own path to the CPU
        args.use_precision_aware_optimizer = True
    return options


def validate_yaml(stock: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Refuse ``--yaml-cfg``, which bypasses the checks above."""
    unchecked = "--optimizer lion" if getattr(args, "optimizer", None) == "lion" else None
    if norm_ratio.options_from(args).is_on:
        unchecked = unchecked or "--norm-ratio-interval"
    if unchecked:
        raise LionError(
            f"--yaml-cfg is not supported with {unchecked}: it bypasses the checks of the command line. Use Megatron's "
            "flags instead"
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


def _adapt(parser: argparse.ArgumentParser) -> None:
    """Add our flags to the parser and route its errors."""
    _accept_lion(parser)
    _replace_betas(parser)
    parser.add_argument(
        "--lion-kernel",
        default=LionOptions.kernel,
        metavar=f"{{{','.join(KERNELS)}}}",
        help="How Lion's step is computed; all give the same bits. fused: one pass over memory, in C++ on a CPU and in "
        "Triton on a GPU. foreach: torch's operations on many tensors at once. reference: one tensor after another, "
        "slow. auto: fused where it can run (on a GPU only after a check of its bits there), else foreach. The "
        "start-up line names the kernel (default: %(default)s).",
    )
    exchange_arguments.add(parser)
    state_precision.add(parser)
    step_telemetry.add(parser)
    fast_norm.add(parser)
    init_from_adam.add(parser)
    parser.set_defaults(lion_rates_from_run=LionOptions.rates_from_run, lion_saves_stacks=LionOptions.saves_stacks)

    for action in parser._actions:  # --help fails at a single %, which some of Megatron's help texts have
        action.help = action.help and re.sub(r"%%|%(?!\()", "%%", action.help)

    def error(message: str) -> None:
        raise LionError(f"{message}. {_nearest_flags(message, parser)}All flags: --help")

    # argparse would print the message, and all of Megatron's usage, once for every rank.
    parser.error = error  # type: ignore[method-assign, assignment]


def _accept_lion(parser: argparse.ArgumentParser) -> None:
    """Add Lion to the names of ``--optimizer``, and name the nearest one for a name that is not there."""
    optimizer = _by_dest(parser)["optimizer"]
    names = tuple(dict.fromkeys([*(optimizer.choices or ()), "lion"]))

    def optimizer_name(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"unknown optimizer {value!r}: {did_you_mean(value, names)}")
        return value

    optimizer.choices, optimizer.type = names, optimizer_name


def _replace_betas(parser: argparse.ArgumentParser) -> None:
    """Give ``--lion-beta1`` and ``--lion-beta2`` the default None, which each optimizer fills in. Add missing ones."""
    flags = _by_dest(parser)
    for dest, ours in zip(config_fields.BETAS, LionOptions.betas, strict=True):
        flag = f"--{dest.replace('_', '-')}"
        option = flags.get(dest) or parser.add_argument(flag, type=float)  # Megatron has none before 0.17
        stock = "" if option.default is None else f"; with other optimizers {option.default:g}"
        option.default = None
        option.help = f"Lion's {dest.removeprefix('lion_')} (default: {ours:g}{stock})."


def _by_dest(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions}


def _nearest_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """For argparse's message about unknown flags: ``--hiden-size: did you mean '--hidden-size'? ``, else nothing."""
    _, is_unknown, words = message.partition("unrecognized arguments: ")
    flags = [word.partition("=")[0] for word in words.split() if word.startswith("-")] if is_unknown else []
    questions = {flag: hint(flag, parser._option_string_actions) for flag in flags}
    return "".join(f"{flag}: {question}" for flag, question in questions.items() if question)


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
