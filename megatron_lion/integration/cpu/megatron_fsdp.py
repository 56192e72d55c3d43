"""Megatron-FSDP without a GPU: the CPU answers for the device that its meshes and buffers name, gloo for NCCL.

Line numbers are megatron-core 0.19.2's.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from megatron_lion.integration.compat import temporarily, wrap


class _Torch(types.ModuleType):
    """torch, with a ``device`` that is the CPU's where CUDA is named.

    Megatron-FSDP passes f"cuda:{torch.cuda.current_device()}" (mcore_fsdp_adapter 156, megatron_fsdp 234). torch.device
    itself cannot be replaced: it is a type that others test for.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: Any, *args: Any) -> torch.device:
        return torch.device("cpu") if str(name).startswith("cuda") else torch.device(name, *args)


def gradient_reduce_preprocessing(
    stock: Callable[..., Any], grad_data: torch.Tensor, scaling_factor: float | None, ddp_config: Any
) -> Any:
    """Scale fp32 gradients before they are reduced. Stock has NCCL do it in the reduction, which gloo cannot (4747)."""
    with temporarily(ddp_config, gradient_reduce_div_fusion=False):
        return stock(grad_data, scaling_factor, ddp_config)


CORE = (
    wrap(
        "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer:gradient_reduce_preprocessing",
        gradient_reduce_preprocessing,
        parameters=("grad_data", "scaling_factor", "ddp_config"),
        since="0.17",
    ),
)


def run_on_cpu() -> None:
    """Replace torch's device and asynchronous gathers in Megatron-FSDP, and the device of meshes, for good.

    Call it once, when Megatron can be imported.
    """
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp import megatron_fsdp, param_and_grad_buffer

    for module in (mcore_fsdp_adapter, megatron_fsdp):
        module.torch = _Torch("torch")
    coalescing = param_and_grad_buffer._coalescing_manager

    def wait_for_all(group: Any, *args: Any, **kwargs: Any) -> Any:
        return coalescing(group)

    # A CUDA stream keeps an asynchronous gather (4561) before the reuse of its buffers, and gloo's threads do not.
    param_and_grad_buffer._coalescing_manager = wait_for_all
    from_group = DeviceMesh.from_group

    @functools.wraps(from_group)
    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    DeviceMesh.from_group = staticmethod(on_cpu)  # type: ignore[method-assign]
