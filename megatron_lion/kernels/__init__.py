"""Faster versions of :func:`megatron_lion.update.lion_update_`, equal bit for bit, and the choice among them."""

from collections.abc import Iterable

import torch

from megatron_lion.config import KERNELS, LionError
from megatron_lion.kernels import compiler, self_check
from megatron_lion.kernels.digits import lion_update_with_digits_
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import fused_problem, fused_supports, lion_update_fused_, supports_dtypes
from megatron_lion.step import LionUpdate, StepKind
from megatron_lion.update import lion_update_

__all__ = ["KERNELS", "check_parameter", "choose", "describe"]


def choose(kernel: str, kind: StepKind, *, digits: bool = False) -> LionUpdate:
    """Return the update function for tensors of ``kind``, which writes ``StepTensors.digits`` if ``digits`` is true.

    - ``"auto"``: on a CPU the fused kernel if :func:`fused_supports` the kind and a C++ compiler works. On a GPU the
      Triton kernel if it supports the kind and has passed :mod:`~megatron_lion.kernels.self_check` there; the first
      call for a kind makes the check. Otherwise foreach.
    - ``"foreach"`` and ``"reference"``: that kernel, on any device and for any kind.
    - ``"fused"``: the C++ kernel on a CPU, the Triton kernel on a GPU, without a self-check.

    Raises:
        LionError: ``"fused"`` cannot be used; the message has the reason.
    """
    update = _choose(kernel, kind)
    return lion_update_with_digits_ if digits and update is lion_update_ else update


def _choose(kernel: str, kind: StepKind) -> LionUpdate:
    if kernel in ("foreach", "reference"):
        return lion_update_foreach_ if kernel == "foreach" else lion_update_
    if kind.device.type == "cuda" and supports_dtypes(kind):
        is_trusted = kernel == "fused" or self_check.result_for(kind).passed
        return _triton_update() if is_trusted else lion_update_foreach_
    problem = fused_problem() if fused_supports(kind) else _unsupported(kind)
    if problem is None:
        return lion_update_fused_
    if kernel == "fused":
        raise LionError(f"the fused kernel cannot be used: {problem}. Use auto, foreach or reference")
    return lion_update_foreach_


def check_parameter(kernel: str, kind: StepKind, param: torch.Tensor) -> None:
    """Refuse ``"fused"`` before the first step if it cannot update ``param``, stored as ``kind``.

    Raises:
        LionError: the message has the reason.
    """
    if kernel == "fused" and kind.device.type != "meta":  # a rehearsal's
        choose(kernel, kind)
        if kind.device.type == "cuda" and not param.is_contiguous():
            raise LionError(
                f"the fused kernel cannot be used on a GPU for a parameter that is not contiguous: shape "
                f"{tuple(param.shape)}, strides {param.stride()}. Make it contiguous, or use auto, foreach or reference"
            )


def describe(kernel: str, kinds: Iterable[StepKind]) -> str:
    """Names of the kernels that ``kernel`` selects for ``kinds``, for the start-up line.

    ``"fused"``, with ``auto`` on a GPU ``"fused (self-checked on <GPU>: ...)"``, or with the reason for a fallback:
    ``"foreach (no C++ compiler on PATH ...)"``.
    """
    return ", ".join(dict.fromkeys(_describe(kernel, kind) for kind in kinds)) or "none"


def _describe(kernel: str, kind: StepKind) -> str:
    name = {lion_update_foreach_: "foreach", lion_update_: "reference"}.get(choose(kernel, kind), "fused")
    reason = None
    if kernel == "auto" and kind.device.type == "cuda" and supports_dtypes(kind):
        reason = self_check.result_for(kind).text
    elif name == "fused" and kind.device.type == "cpu" and (problem := compiler.cache_problem()):
        reason = f"compiled for this run only: {problem}"
    elif kernel == "auto" and name != "fused" and fused_supports(kind):
        reason = fused_problem()
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


def _unsupported(kind: StepKind) -> str:
    dtypes = ", ".join(f"{name} {dtype}" for name, dtype in kind._asdict().items() if isinstance(dtype, torch.dtype))
    return (
        "it supports fp32 and bf16, momenta also in int8, model copies only in bf16, on CPU and CUDA; "
        f"got {dtypes} on {kind.device.type}"
    )
