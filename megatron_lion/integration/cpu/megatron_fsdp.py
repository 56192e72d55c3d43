"""Megatron-FSDP without a GPU: the CPU answers for the device that its meshes and its buffers name.

Line numbers are megatron-core 0.19.2's.
"""

import functools
import types
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh


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


def run_on_cpu() -> None:
    """Replace the two, for this process and for good. Call it once, when Megatron can be imported."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp import megatron_fsdp

    for module in (mcore_fsdp_adapter, megatron_fsdp):
        module.torch = _Torch("torch")
    from_group = DeviceMesh.from_group

    @functools.wraps(from_group)
    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    DeviceMesh.from_group = staticmethod(on_cpu)  # type: ignore[method-assign, assignment]
