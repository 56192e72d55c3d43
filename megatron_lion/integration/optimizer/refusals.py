"""Parts of Megatron that Lion does not support, refused with the same text on the command line and where Lion is built.

Scripts on ``megatron.core`` and frameworks around it do not use Megatron's command line, so the second check is theirs.
"""

import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from megatron_lion.config import LionError, LionOptions, check_rates, dtype_name
from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import formats
from megatron_lion.integration.exchange import refusals as exchange
from megatron_lion.integration.flags import state_precision

# Megatron's flags that Lion does not support, and the alternative to suggest.
UNSUPPORTED = {
    "use_torch_fsdp2": (
        "Megatron cannot resume its checkpoints with any optimizer. Use --use-megatron-fsdp --ckpt-format fsdp_dtensor"
    ),
    "optimizer_cuda_graph": "a captured step would reuse the learning rate of its first capture. Remove the flag",
}
# Settings that are not supported where Megatron-FSDP shards the model, with why and what to do.
UNSUPPORTED_WITH_FSDP = {
    "fp16": "its gradients have no loss scale. Use --bf16",
    "optimizer_cpu_offload": "it passes DTensors to the optimizer. Remove one of them",
    "use_precision_aware_optimizer": (
        "Megatron-FSDP stores the fp32 master weights. Remove the flag; --lion-momentum-dtype bf16 or int8 makes the "
        "momentum smaller"
    ),
    "overlap_param_gather_with_optimizer_step": "Megatron-FSDP gathers before each module runs. Remove the flag",
}


def refuse_flags(args: Any) -> None:
    """Raise LionError for a flag on Megatron's command line that Lion does not support."""
    for dest in UNSUPPORTED:
        if getattr(args, dest, None):
            raise _unsupported(dest)
    if getattr(args, "use_megatron_fsdp", False):
        refuse_fsdp_settings(args, args, LionOptions.from_config(args), args.pipeline_model_parallel_size, args.swiglu)
        _require_reduction_between_instances(args)


def _require_reduction_between_instances(args: Any) -> None:
    """Raise LionError where Megatron would let the instances of Megatron-FSDP drift apart, with any optimizer.

    FSDP reduces gradients between instances in the last micro-batch, which only ``no_sync`` tells it (0.19.2:
    megatron_fsdp 1161). Megatron's loop calls that only with the flag (training 3532).
    """
    instances = args.num_distributed_optimizer_instances
    if instances > 1 and not args.overlap_grad_reduce:
        raise LionError(
            f"--num-distributed-optimizer-instances {instances} with --use-megatron-fsdp needs --overlap-grad-reduce: "
            "without it Megatron does not reduce gradients between the instances. Add it"
        )


def refuse_fsdp_settings(
    settings: Any, ddp_settings: Any, options: LionOptions, pipeline_stages: int, is_gated: bool
) -> None:
    """Raise LionError for a setting that Lion does not support where Megatron-FSDP shards the model.

    ``settings`` and ``ddp_settings`` are the command line, or the configurations of the optimizer and of FSDP.
    """
    found = itertools.chain(
        _unsupported_fsdp(settings, ddp_settings),
        _unsupported_options(options),
        _unsupported_models(settings, ddp_settings.data_parallel_sharding_strategy, pipeline_stages, is_gated),
    )
    for what, why in found:
        raise LionError(f"{what} is not supported with --optimizer lion and --use-megatron-fsdp: {why}")


def _unsupported_fsdp(settings: Any, ddp_settings: Any) -> Iterator[tuple[str, str]]:
    """Which of Megatron's settings Lion does not support with Megatron-FSDP, and why."""
    for dest, why in UNSUPPORTED_WITH_FSDP.items():
        if getattr(settings, dest, False):
            yield f"--{dest.replace('_', '-')}", why
    release, supported = f"megatron-core {compat.megatron_version()}", compat.installed_traits().fsdp_strategies
    if not supported:
        yield release, "it was not run. Use 0.17 to 0.19, or --use-distributed-optimizer"
    strategy = ddp_settings.data_parallel_sharding_strategy
    if strategy not in supported:
        why = "Megatron fails in the first step, with any optimizer. Use another strategy"
        yield f"--data-parallel-sharding-strategy {strategy} of {release}", why
    version = getattr(ddp_settings, "megatron_fsdp_version", 1)
    if version != 1:
        yield f"--megatron-fsdp-version {version}", "it cannot save optimizer state. Use 1"
    masters = dtype_name(getattr(ddp_settings, "megatron_fsdp_main_params_dtype", "fp32"))
    if not (masters == "fp32" or (masters in ("auto", "None") and not settings.bf16)):
        yield f"--megatron-fsdp-main-params-dtype {masters}", "Lion steps fp32 masters. Use fp32"


def _unsupported_options(options: LionOptions) -> Iterator[tuple[str, str]]:
    """What Megatron-FSDP does not support of Lion's options, and why."""
    if options.master_weights != "fp32":
        why = "Megatron-FSDP stores fp32 master weights. Use fp32"
        yield f"--lion-master-weights {options.master_weights}", why
    if options.gather != "params":
        yield f"--lion-gather {options.gather}", "Megatron-FSDP gathers parameters itself. Use params"
    if options.reduce != "stock":
        yield f"--lion-reduce {options.reduce}", "Megatron-FSDP reduces gradients itself. Use stock"


def _unsupported_models(
    settings: Any, strategy: str, pipeline_stages: int, is_gated: bool
) -> Iterator[tuple[str, str]]:
    """Which models Lion cannot save from Megatron-FSDP, and why."""
    if is_gated and strategy == "no_shard":
        why = "Megatron cannot save gated layers that are not sharded. Use another strategy"
        yield f"--data-parallel-sharding-strategy {strategy} with --swiglu", why
    if is_gated and not settings.bf16:
        yield "--swiglu in fp32", "Megatron finds gated layers to save only in a 16-bit model. Add --bf16"
    if pipeline_stages > 1:
        why = "in its checkpoints the layers of two stages have the same names. Use tensor parallelism"
        yield f"--pipeline-model-parallel-size {pipeline_stages}", why


def refuse_where_built(config: Any, options: LionOptions, model_chunks: list[Any]) -> None:
    """Raise LionError, on every rank, for a configuration or a model that Lion does not support.

    Primary weights in fp8 and fp4 are checked where the precision-aware path is chosen, the only one that cannot write
    them. If state is stacked or signs are gathered, issues one gather of names over all ranks.
    """
    check_rates(config.lr, config.weight_decay, config.min_lr)
    if not config.decoupled_weight_decay:
        raise LionError("--optimizer lion needs decoupled_weight_decay=True: Lion's weight decay is decoupled")
    if getattr(config, "optimizer_cuda_graph", False):  # a field since 0.17
        raise _unsupported("optimizer_cuda_graph")
    state_precision.refuse_offload_before_0_19(config)
    if any(map(_is_mimo, model_chunks)) or _is_called_for_mimo():
        raise LionError(
            "MimoModel is not supported with --optimizer lion: Megatron builds an optimizer for each of its modules, "
            "on different ranks. Use another optimizer"
        )
    if compat.uses_megatron_fsdp(model_chunks):
        model = getattr(model_chunks[0], "config", None)
        stages = getattr(model, "pipeline_model_parallel_size", 1)
        is_gated = getattr(model, "gated_linear_unit", False)
        refuse_fsdp_settings(config, model_chunks[0].ddp_config, options, stages, is_gated)
        for chunk in model_chunks:
            _refuse_gradients_divided_twice(chunk)
        return
    for chunk in model_chunks:
        if any(_is_dtensor(param) for param in chunk.parameters()):
            raise _unsupported("use_torch_fsdp2")
    formats.refuse_layers_frozen_apart(options, model_chunks)
    exchange.refuse_where_built(options, config, model_chunks)


def _unsupported(dest: str) -> LionError:
    return LionError(f"--{dest.replace('_', '-')} is not supported with --optimizer lion: {UNSUPPORTED[dest]}")


def _refuse_gradients_divided_twice(chunk: Any) -> None:
    """Raise LionError where Megatron-FSDP divides a gradient once for each micro-batch, with any optimizer.

    These strategies reduce gradients, and divide them by the number of data-parallel ranks, after each micro-batch. In
    a shard group of one rank the buffer that is divided is the one that gradients add up in (0.19.2:
    param_and_grad_buffer 4051 and 4070), so all but the last micro-batch count too little.
    """
    strategy = chunk.ddp_config.data_parallel_sharding_strategy
    if strategy not in ("optim_grads", "optim_grads_params"):
        return
    for group in chunk.param_and_grad_buffer.parameter_groups:
        buffer = group.main_grad_buffer
        if buffer is not None and not buffer.is_data_distributed and buffer.gradient_scaling_factor not in (None, 1.0):
            what = "experts" if group.is_expert_param else "parameters"
            raise LionError(
                f"--data-parallel-sharding-strategy {strategy} is not supported with --optimizer lion and "
                f"--use-megatron-fsdp where one rank shards its {what} with no other: Megatron-FSDP divides their "
                "gradients again in each micro-batch. Use optim or no_shard, more ranks, a smaller "
                "--expert-model-parallel-size, or fewer --num-distributed-optimizer-instances"
            )


def _is_mimo(chunk: Any) -> bool:
    """Whether ``chunk`` is a MimoModel. Its module takes seconds to import, and Megatron imports it only if used."""
    mimo = sys.modules.get("megatron.core.models.mimo.model.base")
    return mimo is not None and isinstance(chunk, mimo.MimoModel)


def _is_called_for_mimo() -> bool:
    """Whether ``get_mimo_optimizer`` is running. It passes one module of a MimoModel, which looks like any model."""
    function = getattr(sys.modules.get("megatron.core.models.mimo.optimizer"), "get_mimo_optimizer", None)
    if function is None:
        return False
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not inspect.unwrap(function).__code__:
        frame = frame.f_back
    return frame is not None


def _is_dtensor(param: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)
