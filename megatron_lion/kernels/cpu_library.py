"""Calls into a compiled CPU library, for the kernels of the exchange."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lion.kernels import compiler


def call(source: Path, types: Mapping[str, Sequence[Any]], name: str, *arguments: float | None) -> None:
    """Call the function ``name`` of the library of ``source``. ``types`` has the C types of its arguments."""
    function = getattr(compiler.load(source), name)
    function.restype, function.argtypes = None, types[name]
    function(*arguments)


def check_on_cpu(*tensors: Tensor) -> None:
    """Raise ValueError for tensors on a device, whose addresses would crash the process."""
    devices = sorted({tensor.device.type for tensor in tensors})
    if devices != ["cpu"]:
        raise ValueError(f"the CPU kernel works on CPU tensors, not on {', '.join(devices)}: use the reference")
