"""The choice among a reference, a compiled CPU kernel and Triton kernels that have the same bits."""

from collections.abc import Callable

import torch

from megatron_lion.config import LionError


def choose_implementation[Kernels](
    kernel: str,
    device: torch.device,
    *,
    what: str,
    reference: Kernels,
    cpu: Kernels,
    cpu_problem: Callable[[], str | None],
    gpu: Callable[[], Kernels],
) -> Kernels:
    """The implementation for tensors on ``device``. ``kernel`` is one of :data:`megatron_lion.config.KERNELS`.

    ``"auto"`` and ``"fused"`` are the compiled kernel on a CPU and the Triton kernels on a GPU. If these are not
    available, ``"auto"`` is the reference. ``"foreach"`` and ``"reference"`` are the reference.

    Args:
        kernel: the option ``--lion-kernel``.
        device: where the tensors are.
        what: the kernels' name in the error.
        reference: the reference implementation.
        cpu: the compiled CPU kernel.
        cpu_problem: returns why the CPU kernel is not available, or None. Called only for a CPU.
        gpu: imports the Triton kernels, which takes a second. Called only for a GPU.

    Raises:
        LionError: ``kernel`` is ``"fused"``, which is not available; the message has the reason.
    """
    if kernel not in ("auto", "fused"):
        return reference
    if device.type == "cpu":
        problem = cpu_problem()
        if problem is None:
            return cpu
    else:
        try:
            return gpu()
        except ImportError as error:
            problem = str(error)
    if kernel == "fused":
        raise LionError(f"the fused kernels of the {what} are not available: {problem}. Use auto or reference")
    return reference
