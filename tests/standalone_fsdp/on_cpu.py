"""The package ``megatron-fsdp`` on a CPU: ``on_cpu.py SCRIPT`` runs a script with it.

Replaced are ``torch.cuda`` (as for Megatron, ``megatron_lion.integration.cpu``), devices and meshes that name CUDA, and
NCCL's reduction with a factor, in whose place the gradients are multiplied first. Sharding, the gathering and
scattering of parameters and gradients, the optimizer's wrapper and the checkpoints are the package's.
"""

import dataclasses
import runpy
import sys
import types
from typing import Any

import torch
import torch.distributed.device_mesh as device_mesh

from megatron_lion.integration.cpu import torch_cuda


class TorchOnCPU(types.ModuleType):
    """torch with a CPU for each device that names CUDA."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: Any) -> torch.device:
        return torch.device("cpu" if str(name).startswith("cuda") else name)


def install() -> None:
    """Import ``megatron_fsdp`` and let it run on a CPU."""
    torch_cuda.replace_cuda()
    import megatron_fsdp  # noqa: F401
    from megatron_fsdp import fully_shard, param_and_grad_buffer

    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_fsdp.") and getattr(module, "torch", None) is torch:
            module.torch = TorchOnCPU("torch")  # type: ignore[attr-defined]
    shard_module = sys.modules[fully_shard.__module__]
    stock_mesh, stock_reduction = device_mesh.init_device_mesh, param_and_grad_buffer.gradient_reduce_preprocessing

    def mesh_on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return stock_mesh("cpu", *args, **kwargs)

    def without_nccl(gradients: Any, factor: Any, config: Any) -> Any:
        return stock_reduction(gradients, factor, dataclasses.replace(config, gradient_reduce_div_fusion=False))

    shard_module.init_device_mesh = mesh_on_cpu  # type: ignore[attr-defined]
    param_and_grad_buffer.gradient_reduce_preprocessing = without_nccl


if __name__ == "__main__":
    install()
    runpy.run_path(sys.argv[1], run_name="__main__")
