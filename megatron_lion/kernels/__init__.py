"""Faster versions of :func:`megatron_lion.update.lion_update_`, equal to it bit for bit, and the choice among them."""

from collections.abc import Sequence

from torch import Tensor

from megatron_lion.config import KERNELS, LionError
from megatron_lion.kernels import compiler
from megatron_lion.kernels.foreach import foreach_supports, lion_update_foreach_
from megatron_lion.kernels.fused import fused_problem, fused_supports, lion_update_fused_
from megatron_lion.update import LionUpdate, lion_update_

__all__ = ["KERNELS", "choose", "describe", "reads_on_device"]


def choose(
    kernel: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    packed: bool = False,
) -> LionUpdate:
    """The update function to call on these tensors; ``packed`` says that remainders or scales go with them.

    ``"auto"`` takes the fused kernel where :func:`fused_supports` the tensors and a compiler was found, else foreach
    where :func:`foreach_supports` them, else the reference. ``"foreach"`` falls back to the reference for packed state
    and tensors of mixed dtypes or devices; ``"reference"`` is taken as asked. On a GPU ``"fused"`` is the Triton
    kernel, which has been run in Triton's interpreter only and is therefore never taken by ``"auto"``.

    Raises:
        LionError: ``"fused"`` was asked for by name and cannot be had; the message has the reason.
    """
    if kernel == "fused" and params and all(t.is_cuda for tensors in (params, grads, exp_avgs) for t in tensors):
        return _triton_update()
    if kernel in ("auto", "fused"):
        problem = None if fused_supports(params, grads, exp_avgs) else _describe(params, grads, exp_avgs)
        problem = problem or fused_problem()
        if problem is None:
            return lion_update_fused_
        if kernel == "fused":
            raise LionError(f"the fused kernel cannot be used: {problem}. Ask for auto, foreach or reference")
    if kernel != "reference" and not packed and foreach_supports(params, grads, exp_avgs):
        return lion_update_foreach_
    return lion_update_


def reads_on_device(update: LionUpdate) -> bool:
    """Whether ``update`` takes ``skip``, and hyperparameters in tensors without reading them on the host."""
    return getattr(update, "__name__", "") == "lion_update_triton_"  # by name, as Triton takes a second to import


def describe(kernel: str, tensors: Sequence[Tensor], *, packed: bool = False) -> str:
    """What ``kernel`` comes to for parameters like ``tensors``, with or without packed state, for the start-up line.

    ``"fused"``, or with the reason why not: ``"foreach (no C++ compiler on PATH ...)"``.
    """
    names = {lion_update_foreach_: "foreach", lion_update_: "reference"}
    name = names.get(choose(kernel, tensors, tensors, tensors, packed=packed), "fused")
    on_cpu = fused_supports(tensors, tensors, tensors)
    reason = fused_problem() if kernel == "auto" and name != "fused" and on_cpu else None
    if name == "fused" and on_cpu and (problem := compiler.cache_problem()):
        reason = f"compiled for this run only: {problem}"
    return f"{name} ({reason})" if reason else name


def _triton_update() -> LionUpdate:
    try:
        from megatron_lion.kernels.triton_lion import lion_update_triton_  # Triton takes a second to import
    except ImportError as error:
        raise LionError(
            f"the fused kernel cannot be used on a GPU: it needs Triton ({error}). "
            "Install triton, or use auto, foreach or reference"
        ) from error
    return lion_update_triton_


def _describe(*roles: Sequence[Tensor]) -> str:
    kinds = sorted({f"{tensor.dtype} on {tensor.device.type}" for tensors in roles for tensor in tensors})
    return f"it takes fp32 and bf16 on the CPU, and momentum in int8, each role of one dtype, not {', '.join(kinds)}"
