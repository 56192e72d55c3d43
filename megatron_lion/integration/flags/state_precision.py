"""In which precision Lion's state is kept under Megatron: the flags, and Megatron's precision-aware path.

State other than fp32 needs ``--use-distributed-optimizer`` and takes the path that Megatron has for Transformer
Engine's precision-aware FusedAdam: the optimizer is given the 16-bit parameters and gradients of any dtype
(``decoupled_grad``), keeps the master weights itself and writes the parameters. Gradients reduced in bf16 take it too,
whatever the state, as there they need no fp32 copy.
"""

import argparse
import contextlib
from typing import Any

import torch

from megatron_lion.config import MASTER_WEIGHTS, MOMENTUM_DTYPES, LionConfig, LionError
from megatron_lion.integration import compat
from megatron_lion.precision import BLOCK

# Megatron's flags for primary weights in fp8 and fp4.
QUANTIZED_WEIGHTS = ("fp8_param_gather", "fp4_param_gather")
MOMENTUM, MASTER = "lion_momentum_dtype", "lion_master_weights"
# What Megatron's --exp-avg-dtype comes to, once validated, and the same in our words.
EXP_AVG_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    parser.add_argument(
        "--lion-momentum-dtype",
        default=None,
        metavar=f"{{{','.join(MOMENTUM_DTYPES)}}}",
        help=f"How to store Lion's momentum; int8 has a bf16 scale for every {BLOCK} elements. Default: fp32, or "
        "--exp-avg-dtype with --use-precision-aware-optimizer.",
    )
    parser.add_argument(
        "--lion-master-weights",
        default=None,
        metavar=f"{{{','.join(MASTER_WEIGHTS)}}}",
        help="How to store the fp32 master of a bf16 parameter: fp32, or the 16 bits that it lacks. Default: "
        "fp32; remainder with --use-precision-aware-optimizer and --bf16, as Adam does.",
    )


def resolve(args: Any) -> None:
    """Settle both flags from what was given, Megatron's own flags included, before Megatron validates them.

    Raises LionError where they contradict each other or cannot be honoured.
    """
    if args.optimizer_cpu_offload:  # Megatron would ask for the flag that its own path to the CPU takes
        args.use_precision_aware_optimizer = True
    aware, given = args.use_precision_aware_optimizer, {"fp32": "fp32", "bf16": "bf16"}
    exp_avg = EXP_AVG_DTYPES.get(args.exp_avg_dtype) or given.get(args.exp_avg_dtype)
    if aware and exp_avg is None:
        raise LionError(
            f"--exp-avg-dtype {args.exp_avg_dtype} is not a precision that Lion's momentum has: give fp32 or bf16, or "
            "--lion-momentum-dtype int8 instead"
        )
    if args.exp_avg_sq_dtype not in ("fp32", torch.float32):
        raise LionError(f"--exp-avg-sq-dtype {args.exp_avg_sq_dtype}: Lion has no second moment. Drop the flag")
    if args.main_params_dtype not in ("fp32", torch.float32):
        raise LionError(
            f"--main-params-dtype {args.main_params_dtype} cannot be honoured with --optimizer lion, whose master "
            "weights are fp32 in value: drop it, or give --lion-master-weights remainder to store 16 bits of them"
        )
    if args.lion_momentum_dtype is None:
        args.lion_momentum_dtype = exp_avg if aware else "fp32"
    elif aware and exp_avg not in ("fp32", args.lion_momentum_dtype):
        raise LionError(
            f"--lion-momentum-dtype {args.lion_momentum_dtype} contradicts --exp-avg-dtype {exp_avg}: drop one of them"
        )
    if args.lion_master_weights is None:
        args.lion_master_weights = "remainder" if aware and args.bf16 and not args.optimizer_cpu_offload else "fp32"
    _check(args)


def _check(args: Any) -> None:
    wanted = {
        "--optimizer-cpu-offload": args.optimizer_cpu_offload,
        f"--lion-momentum-dtype {args.lion_momentum_dtype}": args.lion_momentum_dtype != "fp32",
        f"--lion-master-weights {args.lion_master_weights}": args.lion_master_weights != "fp32",
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer,
        "--main-grads-dtype bf16": args.main_grads_dtype not in ("fp32", torch.float32),
    }
    asked = [flag for flag, is_asked in wanted.items() if is_asked]
    if asked and not args.use_distributed_optimizer:
        raise LionError(f"{asked[0]} needs --use-distributed-optimizer (also on one rank): add it")
    if args.optimizer_cpu_offload and not compat.installed_traits().asks_for_state_keys:
        raise LionError(
            f"--optimizer-cpu-offload has been made to work with Lion from megatron-core 0.19 on, and this is "
            f"{compat.megatron_version()}: drop the flag"
        )
    if args.optimizer_cpu_offload and getattr(args, "lion_telemetry", False):
        raise LionError("--lion-telemetry does not see what --optimizer-cpu-offload steps: drop one of them")
    if args.optimizer_cpu_offload and not (args.bf16 or args.fp16):
        raise LionError(
            "--optimizer-cpu-offload cannot be had in fp32: Megatron's optimizer for it refuses shards of fp32 "
            "parameters. Add --bf16, or drop the flag"
        )
    _refuse_quantized_weights(args)
    if args.lion_master_weights == "remainder" and not args.bf16:
        raise LionError(
            "--lion-master-weights remainder stores what a bf16 parameter lacks of its fp32 master; this run has no "
            "bf16 parameters: add --bf16, or give --lion-master-weights fp32"
        )


def _refuse_quantized_weights(args: Any) -> None:
    """Raise LionError for primary weights in fp8 or fp4 where the precision-aware path will be taken."""
    flags = [f"--{dest.replace('_', '-')}" for dest in QUANTIZED_WEIGHTS if getattr(args, dest, False)]
    is_compact = (args.lion_momentum_dtype, args.lion_master_weights) != ("fp32", "fp32")
    has_bf16_gradients = args.bf16 and (
        args.grad_reduce_in_bf16 or args.main_grads_dtype not in ("fp32", torch.float32)
    )
    if flags and (is_compact or args.optimizer_cpu_offload or has_bf16_gradients):
        raise quantized_weights(flags[0])


def quantized_weights(found: str) -> LionError:
    """The error for primary weights in fp8 or fp4 on the precision-aware path."""
    return LionError(
        f"{found} is not supported where Lion writes the 16-bit parameters itself, because it cannot write fp8 or fp4. "
        "It does so with compact state, bf16 gradients or --optimizer-cpu-offload. Use fp32 momentum and master "
        f"weights and fp32 gradients (--accumulate-allreduce-grads-in-fp32), or drop {found}"
    )


def stock_flags(args: Any) -> contextlib.AbstractContextManager[None]:
    """Hide Megatron's precision-aware flags while it builds its configuration: it accepts them for Adam alone."""
    fp32 = {"main_grads_dtype": torch.float32, "exp_avg_dtype": torch.float32}
    return compat.temporarily(args, use_precision_aware_optimizer=False, **fp32)


def use_precision_aware_path(config: Any, lion_config: LionConfig, model_chunks: list[Any]) -> bool:
    """Set Megatron's precision-aware path in ``config`` (in place) where it is needed. Returns whether it is.

    Raises LionError where it is needed and the optimizer is not distributed, or the model's weights are fp8 or fp4.
    """
    ddp_config = getattr(model_chunks[0], "ddp_config", None)
    bf16_gradients = config.bf16 and ddp_config is not None and not ddp_config.grad_reduce_in_fp32
    if config.optimizer_cpu_offload and lion_config.is_compact:
        raise LionError(
            f"--optimizer-cpu-offload keeps momentum and master weights in fp32, so --lion-momentum-dtype "
            f"{lion_config.momentum_dtype} with --lion-master-weights {lion_config.master_weights} cannot be honoured: "
            "give fp32 for both, or drop --optimizer-cpu-offload, which they may make unnecessary"
        )
    needed = lion_config.is_compact or config.optimizer_cpu_offload
    needed = needed or (bf16_gradients and config.use_distributed_optimizer)
    if needed and not config.use_distributed_optimizer:
        raise LionError(
            f"momentum in {lion_config.momentum_dtype}, master weights as {lion_config.master_weights}, offload to the "
            f"CPU {config.optimizer_cpu_offload}: this needs use_distributed_optimizer=True (also on one rank)"
        )
    if needed:
        if found := _quantized_weights_of(model_chunks):
            raise quantized_weights(found)
        compat.set_precision_aware(config)
    return needed


def _quantized_weights_of(model_chunks: list[Any]) -> str | None:
    """What makes primary weights of the model fp8 or fp4: a setting, or a weight itself. None where they are not."""
    for chunk in model_chunks:
        for config, names in (
            (getattr(chunk, "ddp_config", None), QUANTIZED_WEIGHTS),
            (getattr(chunk, "config", None), ("fp8_param", "fp4_param")),
        ):
            for name in names:
                if getattr(config, name, False):
                    return f"{name}=True"
        for name, param in chunk.named_parameters():
            if compat.is_quantized(param):
                return f"the {type(param).__name__} {name}"
    return None
