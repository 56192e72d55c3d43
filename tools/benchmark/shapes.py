"""The parameters that are stepped, and a description of the machine."""

import platform
from pathlib import Path

import torch
from torch import Tensor

MODELS = {"gpt2-small": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280)}
VOCABULARY, POSITIONS = 50_257, 1024


def shapes(name: str) -> list[tuple[int, ...]]:
    """The parameters of a GPT-2 with tied embeddings, in the model's order: gpt2-small has 148, 124.4M elements."""
    layers, width = MODELS[name]
    layer = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(VOCABULARY, width), (POSITIONS, width), *(layer * layers), (width,), (width,)]


def parameters(sizes: list[tuple[int, ...]], device: str = "cpu") -> list[torch.nn.Parameter]:
    """Parameters with gradients of a usual size: one set, which every candidate steps."""
    params = [torch.nn.Parameter(torch.randn(size, device=device) * 1e-2) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def gradient(param: torch.nn.Parameter) -> Tensor:
    """The gradient that :func:`parameters` gave."""
    assert param.grad is not None
    return param.grad


def bf16_twins(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """bf16 parameters of the same values, without gradients."""
    return [torch.nn.Parameter(param.detach().bfloat16()) for param in params]


def machine(device: str = "cpu") -> str:
    """The CPU or the GPU, and the versions that matter."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads, {versions}"
