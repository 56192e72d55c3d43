"""What ``--lion-gather signs`` is not supported with, on the command line and where Lion is built."""

import platform
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration.flags import state_precision

# Settings of the command line, of the model's or of the optimizer's configuration, with why and what to do.
# CPU offload and unsharded optimizers are refused by LionOptions, Megatron-FSDP by optimizer/refusals.py, and torch
# FSDP2 for Lion as a whole.
_QUANTIZED = "a replay writes 16-bit and fp32 parameters only"
_GRAPHS = "a captured graph would not replay the signs"
UNSUPPORTED = {
    "fp8_param_gather": _QUANTIZED,
    "fp4_param_gather": _QUANTIZED,
    "enable_cuda_graph": _GRAPHS,
    "external_cuda_graph": _GRAPHS,
    "overlap_param_gather_with_optimizer_step": "it gathers before all of the optimizer has stepped",
}


def refuse_settings(settings: Any) -> None:
    """Raise LionError for a setting in ``settings``, a command line or a configuration, that is not supported."""
    for name, why in UNSUPPORTED.items():
        if getattr(settings, name, False):
            raise _unsupported(f"--{name.replace('_', '-')}", why)
    graphs = getattr(settings, "cuda_graph_impl", "none")
    if graphs not in (None, "none"):
        raise _unsupported(f"--cuda-graph-impl {graphs}", _GRAPHS)


def refuse_where_built(config: Any, model_chunks: list[Any]) -> None:
    """Raise LionError, on every rank, for a model or devices that are not supported. Issues one gather of names."""
    for settings in (config, *(getattr(chunk, "config", None) for chunk in model_chunks)):
        refuse_settings(settings)
    if found := state_precision.quantized_weights_of(model_chunks):
        raise _unsupported(found, _QUANTIZED)
    devices: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(devices, _device_name(model_chunks))
    if len(kinds := sorted(set(devices))) > 1:
        raise _unsupported(
            f"a mix of devices ({', '.join(kinds)})", "every rank repeats the others' steps and must round as they do"
        )


def _device_name(model_chunks: list[Any]) -> str:
    param = next((param for chunk in model_chunks for param in chunk.parameters()), None)
    if param is None or param.device.type == "cpu":
        return f"CPU, {platform.machine()}"
    return torch.cuda.get_device_name(param.device)


def _unsupported(what: str, why: str) -> LionError:
    return LionError(f"--lion-gather signs is not supported with {what}: {why}. Use --lion-gather params")
