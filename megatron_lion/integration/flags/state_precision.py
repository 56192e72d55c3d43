"""Flags for optimizer-state precision under Megatron, and Megatron's precision-aware path.

State other than fp32 needs ``--use-distributed-optimizer`` and takes the path that Megatron has for Transformer
Engine's precision-aware FusedAdam: the optimizer gets the 16-bit parameters and gradients of any dtype
(``decoupled_grad``), keeps the master weights itself and writes the parameters. A run with bf16 gradients
takes this path too, whatever its state, so that no fp32 copy of them is needed.
"""

import argparse
import math
from typing import Any

from megatron_lion.config import MASTER_WEIGHTS, MOMENTUM_DTYPES, LionError, LionOptions, dtype_name
from megatron_lion.integration import compat, console
from megatron_lion.precision import BLOCK

# Megatron's flags for primary weights in fp8 and fp4.
QUANTIZED_WEIGHTS = ("fp8_param_gather", "fp4_param_gather")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    parser.add_argument(
        "--lion-momentum-dtype",
        default=None,
        metavar=f"{{{','.join(MOMENTUM_DTYPES)}}}",
        help=f"How to store Lion's momentum; int8 has a bf16 scale for every {BLOCK} elements (default: "
        f"{LionOptions.momentum_dtype}; --exp-avg-dtype with --use-precision-aware-optimizer).",
    )
    parser.add_argument(
        "--lion-master-weights",
        default=None,
        metavar=f"{{{','.join(MASTER_WEIGHTS)}}}",
        help="How to store the fp32 master of a bf16 parameter: fp32, or the 16 bits that it lacks (default: "
        f"{LionOptions.master_weights}; remainder with --use-precision-aware-optimizer and --bf16, as Adam does).",
    )


def check(args: Any, options: LionOptions) -> None:
    """Raise LionError for flags that are not supported with state stored as in ``options``."""
    if dtype_name(args.exp_avg_sq_dtype) != "fp32":
        raise LionError(f"--exp-avg-sq-dtype {args.exp_avg_sq_dtype}: Lion has no second moment. Remove the flag")
    if args.optimizer_cpu_offload and getattr(args, "lion_telemetry", False):
        raise LionError("--lion-telemetry does not see the steps of --optimizer-cpu-offload: remove one of them")
    refuse_offload_before_0_19(args)
    flags = [f"--{dest.replace('_', '-')}" for dest in QUANTIZED_WEIGHTS if getattr(args, dest, False)]
    has_bf16_gradients = args.bf16 and (args.grad_reduce_in_bf16 or dtype_name(args.main_grads_dtype) != "fp32")
    if flags and (options.is_compact or args.optimizer_cpu_offload or has_bf16_gradients):
        raise quantized_weights(flags[0])


def pad_buckets_for_blocks(args: Any, options: LionOptions) -> None:
    """Set Megatron's flag that pads buckets, in ``args``, where a shard boundary would cut a block of 8-bit momentum.

    Parameters begin at multiples of 64 elements in a bucket. Megatron pads a bucket of n shards to a multiple of
    lcm(n, 128) elements, so that shards are multiples of 32 elements only if 8 does not divide n. With its flag the
    multiple is lcm(n, 65536). Call it when Megatron has validated ``args``.
    """
    if options.momentum_dtype != "int8" or not args.use_distributed_optimizer:
        return
    if args.ddp_pad_buckets_for_high_nccl_busbw:
        return
    if cut := [shards for shards in _shards(args) if math.lcm(shards, 128) // shards % BLOCK]:
        args.ddp_pad_buckets_for_high_nccl_busbw = True
        console.say(
            f"int8 momentum: buckets are padded to multiples of {math.lcm(max(cut), 2**16)} elements "
            f"(--ddp-pad-buckets-for-high-nccl-busbw), because boundaries of {max(cut)} shards would cut blocks of "
            f"{BLOCK} elements"
        )


def _shards(args: Any) -> set[int]:
    """Numbers of shards that buckets are divided into: of dense parameters, and of experts' if there are any."""
    instances = getattr(args, "num_distributed_optimizer_instances", 1) or 1
    shards = {args.data_parallel_size * args.context_parallel_size // instances}
    if getattr(args, "num_experts", None):
        tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
        of_one = tensor * args.expert_model_parallel_size * args.pipeline_model_parallel_size
        shards.add(args.world_size // of_one // instances)
    return shards


def refuse_offload_before_0_19(settings: Any) -> None:
    """Raise LionError if ``settings``, a configuration or a command line, offload to the CPU in an older Megatron."""
    if settings.optimizer_cpu_offload and not compat.installed_traits().asks_for_state_keys:
        raise LionError(
            "--optimizer-cpu-offload is supported with Lion from megatron-core 0.19 on, and this is "
            f"{compat.megatron_version()}: remove the flag"
        )


def quantized_weights(found: str) -> LionError:
    """The error for primary weights in fp8 or fp4 on the precision-aware path."""
    return LionError(
        f"{found} is not supported where Lion writes the 16-bit parameters itself, because it cannot write fp8 or fp4. "
        "It does so with compact state, bf16 gradients or --optimizer-cpu-offload. Use fp32 momentum and master "
        f"weights and fp32 gradients (--accumulate-allreduce-grads-in-fp32), or drop {found}"
    )


def use_precision_aware_path(config: Any, options: LionOptions, model_chunks: list[Any]) -> bool:
    """Set in ``config``, in place, whether Megatron's precision-aware path is taken. Returns whether it is.

    Raises LionError if it is and the model's weights are fp8 or fp4.
    """
    ddp_config = getattr(model_chunks[0], "ddp_config", None)
    bf16_gradients = config.bf16 and ddp_config is not None and not ddp_config.grad_reduce_in_fp32
    needed = options.is_compact or config.optimizer_cpu_offload
    needed = needed or (bf16_gradients and config.use_distributed_optimizer)
    if needed and (found := quantized_weights_of(model_chunks)):
        raise quantized_weights(found)
    compat.set_precision_aware(config, needed)
    return bool(needed)


def quantized_weights_of(model_chunks: list[Any]) -> str | None:
    """The setting, or the weight, that makes primary weights of the model fp8 or fp4; None if there is none."""
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
