"""Lion in one pass over memory on a CPU: a list of tensors in one call of the compiled kernel."""

import ctypes
import itertools
import operator
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lion.kernels import compiler
from megatron_lion.precision import Place
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import lion_update_

OPTIONAL = ("copies", "remainders", "scales")
# What roles are stored in, in the order of the kernel's numbers for it: in the dtype of the arithmetic's values, or
# packed into two roles.
PLAIN = ((torch.float32,), (torch.bfloat16,))
PACKED = {"params": (torch.bfloat16, torch.int16), "exp_avgs": (torch.int8, torch.bfloat16), "grads": ()}

Roles = dict[str, Any]
_on_cpu = operator.attrgetter("is_cpu")


def fused_problem() -> str | None:
    """Why the CPU kernel cannot be used on this machine, or None. Compiles it where that has not been done yet."""
    try:
        compiler.load()
    except compiler.CompilerUnavailable as error:
        return str(error)
    return None


def fused_supports(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> bool:
    """Whether all tensors are on the CPU, and those of each role of one dtype: fp32, bf16, momentum also int8."""
    plain = {torch.float32, torch.bfloat16}
    for tensors, stored in ((params, plain), (grads, plain), (exp_avgs, plain | {torch.int8})):
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1 or not dtypes.issubset(stored) or not all([t.is_cpu for t in tensors]):
            return False
    return True


@torch.no_grad()
def lion_update_fused_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    copies: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor] | None = None,
    scales: Sequence[Tensor] | None = None,
    places: Sequence[Place] | None = None,
    telemetry: Telemetry | None = None,
) -> None:
    """:func:`megatron_lion.update.lion_update_` for tensors that :func:`fused_supports`; the same bits, in place.

    Uses ``torch.get_num_threads()`` threads and no temporary memory. Tensors that are not contiguous are left to the
    reference; ``copies`` must be bf16. Raises ValueError, and writes nothing, if a tensor is not on the CPU or sizes or
    dtypes do not fit; RuntimeError where :func:`fused_problem` has a reason.
    """
    hyper: dict[str, Any] = dict(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, grad_scale=grad_scale)
    roles: Roles = {"params": params, "grads": grads, "exp_avgs": exp_avgs}
    roles |= {name: role for name, role in zip(OPTIONAL, (copies, remainders, scales), strict=True) if role is not None}
    if scales is not None:
        roles["places"] = [Place.of_whole(param) for param in params] if places is None else places
    if len({len(role) for role in roles.values()}) > 1:
        raise ValueError(f"one entry a parameter is needed, not { {name: len(role) for name, role in roles.items()} }")
    tensors = [role for name, role in roles.items() if name != "places"]
    if not all(map(_on_cpu, itertools.chain.from_iterable(tensors))):  # an address on a device would crash the process
        found = sorted({tensor.device.type for role in tensors for tensor in role})
        raise ValueError(f"the CPU kernel takes tensors on the CPU, not on {', '.join(found)}: use kernels.choose")
    # Of 3,000 parameters each pass over a role is a part of the host's time, hence map.
    dense = [all(row) for row in zip(*(map(Tensor.is_contiguous, role) for role in tensors), strict=True)]
    if not all(dense):
        lion_update_(**_picked(roles, [not chosen for chosen in dense]), **hyper, telemetry=telemetry)
        roles = _picked(roles, dense)
    if any(dense):
        _update_contiguous(roles, hyper, telemetry)


def _picked(roles: Roles, chosen: list[bool]) -> Roles:
    return {name: list(itertools.compress(role, chosen)) for name, role in roles.items()}


def _update_contiguous(roles: Roles, hyper: dict[str, Any], telemetry: Telemetry | None) -> None:
    kinds = [_kind(roles, "params", "remainders"), _kind(roles, "grads"), _kind(roles, "exp_avgs", "scales")]
    numels = array("q", map(Tensor.numel, roles["params"]))
    scale_numels = array("q", map(Tensor.numel, roles.get("scales", ())))
    if any(array("q", map(Tensor.numel, roles[name])) != numels for name in roles.keys() - {"scales", "places"}):
        raise ValueError("parameter, gradient, momentum, copy and remainder differ in size")
    if (copied := {copy.dtype for copy in roles.get("copies", ())}) - {torch.bfloat16}:
        raise ValueError(f"copies are bf16 here, not {copied}: use the reference")
    addresses = array("Q")
    for name in ("params", "grads", "exp_avgs", *OPTIONAL):
        addresses.extend(map(Tensor.data_ptr, roles[name]) if name in roles else itertools.repeat(0, len(numels)))
    places = array("q", itertools.chain.from_iterable(roles.get("places", ())))
    numbers = array("d", [hyper[name] for name in ("lr", "beta1", "beta2", "weight_decay", "grad_scale")])
    sums = array("d", [0.0] * 6)
    wrong = _kernel(*(() if telemetry is None else ("TELEMETRY",)))(
        len(numels),
        *(values.buffer_info()[0] for values in (addresses, numels, places, scale_numels, numbers)),
        *kinds,
        "copies" in roles,
        torch.get_num_threads(),
        sums.buffer_info()[0],
    )
    if wrong:
        place, numel, scale = (role[wrong - 1] for role in (roles["places"], numels, scale_numels))
        raise ValueError(f"{numel} elements at {place} have {place.blocks(numel)} scales, not {scale}")
    if telemetry is not None:
        l1, l2_squared, inner, zeros, flipped, linf_param = sums
        telemetry.merge(Telemetry(sum(numels), l1, l2_squared, inner, int(zeros), int(flipped), linf_param))
    # The writes were made behind autograd's back: a backward pass that needs the old values must still fail.
    written = [role for name, role in roles.items() if name not in ("grads", "places")]
    torch.autograd.graph.increment_version(list(itertools.chain.from_iterable(written)))


def _kernel(*macros: str) -> Any:
    """``lion_cpu_update`` of lion_cpu.cpp, compiled with ``macros``, as a function of Python numbers and addresses."""
    function = compiler.load(compiler.SOURCE, *macros).lion_cpu_update
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 5, ctypes.c_void_p]
    return function


def _kind(roles: Roles, name: str, rest: str = "") -> int:
    """The kernel's number for what the role ``name``, with the role ``rest`` where that is given, is stored in."""
    stored = [{tensor.dtype for tensor in roles[role]} for role in (name, rest) if role in roles]
    for kind, dtypes in enumerate((*PLAIN, PACKED[name])):
        if stored == [{dtype} for dtype in dtypes]:
            return kind
    raise ValueError(f"{name} are fp32, bf16 or {PACKED[name]}, each role of one dtype, not {stored}")
