"""What ``--lion-gather signs`` and ``--lion-reduce`` are not supported with, on the command line and where Lion is
built."""

import platform
from collections.abc import Iterator
from typing import Any

import torch

from megatron_lion.config import LionError, LionOptions
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
# The same for --lion-reduce. The names on the command line come before those of DDP's configuration.
_OTHER_REDUCTION = "it replaces the same reduction"
_UNTESTED = "its gradient buffers have not been tested with it"
_IN_GRAPHS = "a captured graph would not keep what was not sent"
UNSUPPORTED_REDUCE = {
    "ddp_reduce_scatter_with_fp32_accumulation": _OTHER_REDUCTION,
    "reduce_scatter_with_fp32_accumulation": _OTHER_REDUCTION,
    "use_megatron_fsdp": "Megatron-FSDP reduces gradients itself",
    "use_torch_fsdp2": "torch FSDP2 reduces gradients itself",
    "fp8_param_gather": _UNTESTED,
    "fp4_param_gather": _UNTESTED,
    "enable_cuda_graph": _IN_GRAPHS,
    "external_cuda_graph": _IN_GRAPHS,
    "mtp_num_layers": "multi-token prediction clips its gradients apart",
}


def refuse_settings(options: LionOptions, settings: Any) -> None:
    """Raise LionError for a setting in ``settings``, a command line or a configuration, that is not supported."""
    graphs = getattr(settings, "cuda_graph_impl", "none") not in (None, "none")
    for flag, default, unsupported, why in _asked(options):
        for name, reason in unsupported.items():
            if getattr(settings, name, False):
                raise _unsupported(flag, default, f"--{name.replace('_', '-')}", reason)
        if graphs:
            raise _unsupported(flag, default, f"--cuda-graph-impl {settings.cuda_graph_impl}", why)
    if options.reduce != "stock" and (getattr(settings, "num_distributed_optimizer_instances", 1) or 1) > 1:
        raise _unsupported(
            f"--lion-reduce {options.reduce}",
            "--lion-reduce stock",
            f"--num-distributed-optimizer-instances {settings.num_distributed_optimizer_instances}",
            "it does not reduce between instances",
        )


def refuse_where_built(options: LionOptions, config: Any, model_chunks: list[Any]) -> None:
    """Raise LionError, on every rank, for a model or devices that are not supported.

    With signs, issues one gather of names.
    """
    of_chunks = [getattr(chunk, name, None) for chunk in model_chunks for name in ("config", "ddp_config")]
    for settings in (config, *of_chunks):
        refuse_settings(options, settings)
    if found := state_precision.quantized_weights_of(model_chunks):
        for flag, default, unsupported, _ in _asked(options):
            raise _unsupported(flag, default, found, unsupported["fp8_param_gather"])
    if options.gather == "signs":
        _refuse_mixed_devices(model_chunks)


def _refuse_mixed_devices(model_chunks: list[Any]) -> None:
    devices: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(devices, _device_name(model_chunks))
    if len(kinds := sorted(set(devices))) > 1:
        raise _unsupported(
            "--lion-gather signs",
            "--lion-gather params",
            f"a mix of devices ({', '.join(kinds)})",
            "every rank repeats the others' steps and must round as they do",
        )


def _asked(options: LionOptions) -> Iterator[tuple[str, str, dict[str, str], str]]:
    """For each exchange in use: its flag, the flag of Megatron's own, what is not supported, and why graphs are not."""
    if options.gather == "signs":
        yield "--lion-gather signs", "--lion-gather params", UNSUPPORTED, _GRAPHS
    if options.reduce != "stock":
        yield f"--lion-reduce {options.reduce}", "--lion-reduce stock", UNSUPPORTED_REDUCE, _IN_GRAPHS


def _device_name(model_chunks: list[Any]) -> str:
    param = next((param for chunk in model_chunks for param in chunk.parameters()), None)
    if param is None or param.device.type == "cpu":
        return f"CPU, {platform.machine()}"
    return torch.cuda.get_device_name(param.device)


def _unsupported(flag: str, default: str, what: str, why: str) -> LionError:
    return LionError(f"{flag} is not supported with {what}: {why}. Use {default}")
