"""Parts of Megatron that Lion does not support, refused with the same text on the command line and where Lion is built.

Scripts on ``megatron.core`` and frameworks around it do not use Megatron's command line, so the second check is theirs.
"""

import inspect
import sys
from typing import Any

from megatron_lion.config import LionError, LionOptions, check_rates
from megatron_lion.integration.checkpoint import formats
from megatron_lion.integration.exchange import refusals as exchange
from megatron_lion.integration.flags import state_precision

# Megatron's flags that Lion does not support, and the alternative to suggest.
UNSUPPORTED = {
    "use_megatron_fsdp": "Megatron-FSDP has its own optimizer state layout. Use --use-distributed-optimizer",
    "use_torch_fsdp2": "torch FSDP2 is not supported with Lion. Use --use-distributed-optimizer",
    "optimizer_cuda_graph": "a captured step would reuse the learning rate of its first capture. Remove the flag",
}


def refuse_flags(args: Any) -> None:
    """Raise LionError for a flag on Megatron's command line that Lion does not support."""
    for dest in UNSUPPORTED:
        if getattr(args, dest, None):
            raise _unsupported(dest)


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
    for chunk in model_chunks:
        if getattr(getattr(chunk, "ddp_config", None), "use_megatron_fsdp", False):
            raise _unsupported("use_megatron_fsdp")
        if any(_is_dtensor(param) for param in chunk.parameters()):
            raise _unsupported("use_torch_fsdp2")
    formats.refuse_layers_frozen_apart(options, model_chunks)
    exchange.refuse_where_built(options, config, model_chunks)


def _unsupported(dest: str) -> LionError:
    return LionError(f"--{dest.replace('_', '-')} is not supported with --optimizer lion: {UNSUPPORTED[dest]}")


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
