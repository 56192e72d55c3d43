"""Arguments of one Lion update: its tensors and its scalars, in the form that every kernel takes."""

import itertools
import operator
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from megatron_lion.precision import BlockLayout, block_counts
from megatron_lion.telemetry import Telemetry

_device, _dtype = operator.attrgetter("device"), operator.attrgetter("dtype")

# The usual types. Only other ones need a closer look.
PLAIN_TYPES = {Tensor, torch.nn.Parameter}

# Each role of a step's tensors, in the order of StepKind's fields.
ROLES = ("masters", "grads", "exp_avgs", "model_copies", "remainders", "scales")


class StepKind(NamedTuple):
    """The device of a step's tensors, and the one dtype of each role. None where a role is absent."""

    device: torch.device
    masters: torch.dtype
    grads: torch.dtype
    exp_avgs: torch.dtype
    model_copies: torch.dtype | None = None
    remainders: torch.dtype | None = None
    scales: torch.dtype | None = None

    @property
    def is_packed(self) -> bool:
        """Whether masters or momenta are split over two tensors."""
        return self.remainders is not None or self.scales is not None


@dataclass
class StepTensors:
    """Tensors of one update; entry i of each list belongs to parameter i. Tensors may be empty.

    All tensors are on one device, and each list has one dtype. Tensors of a parameter have the same shape
    (except ``scales``), in any memory layout; only their numbers of elements are checked. Only ``grads`` and ``blocks``
    are not modified by an update.

    The constructor checks all of this, once for all kernels. It replaces each DTensor by this rank's local tensor, so
    no kernel sees another one. It issues no collective and does not wait for a device.

    Raises:
        ValueError: the lists, sizes, dtypes or devices do not fit together, or a tensor has no memory.
    """

    masters: list[Tensor]
    """Parameters, or their fp32 master weights. bf16 where there are remainders."""
    grads: list[Tensor]
    """Any floating-point dtype."""
    exp_avgs: list[Tensor]
    """Momenta in any floating-point dtype, or int8 codes where there are scales."""
    model_copies: list[Tensor] | None = None
    """Written: each new master rounded to the copy's dtype, as a model's 16-bit parameter is from its fp32 master."""
    remainders: list[Tensor] | None = None
    """int16: with the bf16 ``masters`` they are the fp32 masters (:func:`~megatron_lion.precision.join_master`)."""
    scales: list[Tensor] | None = None
    """bf16, one per block: with the codes they are the momenta (:func:`~megatron_lion.precision.dequantize`)."""
    blocks: list[BlockLayout] | None = None
    """Position of each tensor in its parameter. Used only with ``scales``; the default is whole parameters."""
    digits: list[Tensor] | None = None
    """Written: uint8, what a rank with the old :attr:`model_params` needs to make the same step
    (:func:`megatron_lion.exchange.digits.sign_digits`). Model copies must be the masters, rounded, before the step."""

    kind: StepKind | None = field(init=False, default=None)
    """None if there is no tensor."""
    numels: "array[int]" = field(init=False, repr=False)
    """Elements of each parameter, int64."""
    addresses: list[int] = field(init=False, repr=False)
    """Those of :meth:`all_tensors` when this was constructed."""
    launch: object | None = field(init=False, repr=False, default=None)
    """What a kernel has prepared for these tensors at these addresses."""

    def __post_init__(self) -> None:
        if self.scales is not None and self.blocks is None:
            self.blocks = [BlockLayout.of_whole(master) for master in self.masters]
        for name, tensors in self.roles().items():
            setattr(self, name, _local(tensors))
        roles = self.roles()
        lengths = {name: len(tensors) for name, tensors in roles.items()}
        if self.scales is not None and self.blocks is not None:
            lengths["blocks"] = len(self.blocks)
        if self.digits is not None:
            lengths["digits"] = len(self.digits)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"every list must have one entry per parameter, got lengths {lengths}")
        self.numels = array("q", map(Tensor.numel, self.masters))
        self.addresses = list(map(Tensor.data_ptr, self.all_tensors()))
        if self.masters:
            self.kind = _kind_of(roles)
            if self.digits is not None:
                _check_digits(self.digits, self.kind.device)
            self._check_sizes(roles if self.digits is None else {**roles, "digits": self.digits})
            if self.scales is not None and self.blocks is not None:
                self._check_scales(self.scales, self.blocks)

    def roles(self) -> dict[str, list[Tensor]]:
        """The lists of tensors that are present, by name, in the order of :data:`ROLES`."""
        return {name: tensors for name in ROLES if (tensors := getattr(self, name)) is not None}

    def all_tensors(self) -> list[Tensor]:
        """All tensors, one role after another."""
        return list(itertools.chain.from_iterable(self.roles().values()))

    def are_captured(self) -> bool:
        """Whether a CUDA graph is being captured on their device."""
        if self.kind is None or self.kind.device.type != "cuda":
            return False
        with torch.cuda.device(self.kind.device):
            return torch.cuda.is_current_stream_capturing()

    @property
    def model_params(self) -> list[Tensor]:
        """The parameters of the model, which data-parallel ranks share: the model copies, or the masters."""
        return self.masters if self.model_copies is None else self.model_copies

    def entries(self) -> Iterator[tuple[Any, ...]]:
        """One tuple per parameter: a tensor for each of :data:`ROLES`, then its layout. None where a role is absent."""
        lists = [getattr(self, name) for name in (*ROLES, "blocks")]
        absent = [None] * len(self.masters)
        return zip(*(absent if values is None else values for values in lists), strict=True)

    def select(self, chosen: list[bool]) -> "StepTensors":
        """The tensors of the parameters with a true entry in ``chosen``."""
        lists = {name: getattr(self, name) for name in (*ROLES, "blocks", "digits")}
        return StepTensors(
            **{name: values and list(itertools.compress(values, chosen)) for name, values in lists.items()}
        )

    def are_contiguous(self) -> list[bool]:
        """For each parameter, whether all of its tensors are contiguous."""
        contiguous = (map(Tensor.is_contiguous, tensors) for tensors in self.roles().values())
        return list(map(all, zip(*contiguous, strict=True)))

    def _check_sizes(self, roles: dict[str, list[Tensor]]) -> None:
        for name in roles.keys() - {"masters", "scales"}:
            if (numels := array("q", map(Tensor.numel, roles[name]))) != self.numels:
                index = next(i for i, (one, two) in enumerate(zip(numels, self.numels, strict=True)) if one != two)
                raise ValueError(
                    f"{name}[{index}] has {numels[index]} elements, but masters[{index}] has {self.numels[index]}"
                )

    def _check_scales(self, scales: list[Tensor], blocks: list[BlockLayout]) -> None:
        found = _int64(map(Tensor.numel, scales))
        starts, row_lengths = _int64(itertools.chain.from_iterable(blocks)).view(-1, 2).unbind(1)
        expected = block_counts(starts, row_lengths, _int64(self.numels))
        if not torch.equal(expected, found):
            index = int((expected != found).nonzero()[0])
            raise ValueError(
                f"scales[{index}] has {found[index]} entries, but {self.numels[index]} elements with {blocks[index]} "
                f"have {expected[index]} blocks"
            )


class StepScalars(NamedTuple):
    """Numbers of one update, the same for all of its tensors.

    ``lr``, ``weight_decay`` and ``grad_scale`` may be one-element tensors. The Triton kernel reads them, and ``skip``,
    on the device, so that a captured CUDA graph follows what is written to them later. Other kernels wait for them on
    the host.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float | Tensor
    grad_scale: float | Tensor = 1.0
    """Multiplies each gradient first, in the dtype of the arithmetic, such as a clip factor."""
    skip: Tensor | None = None
    """One int32 element. If it is not 0, the update changes nothing."""

    def skips(self) -> bool:
        """Whether the update changes nothing, read on the host."""
        return self.skip is not None and bool(self.skip)

    def on_host(self) -> tuple[float, float, float, float, float]:
        """lr, beta1, beta2, weight_decay and grad_scale as Python floats."""
        lr, weight_decay, grad_scale = on_host(self.lr, self.weight_decay, self.grad_scale)
        return (lr, self.beta1, self.beta2, weight_decay, grad_scale)


def on_host(*values: float | Tensor) -> list[float]:
    """``values``, each a number or a one-element tensor, as Python floats. Waits at most once for a device."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    read: Iterator[Any] = iter(tensors)
    if len(tensors) > 1 and len(set(map(_device, tensors))) == 1:
        read = iter(torch.stack([tensor.detach().reshape(()).double() for tensor in tensors]).tolist())
    return [float(next(read) if isinstance(value, Tensor) else value) for value in values]


class LionUpdate(Protocol):
    """Signature of :func:`megatron_lion.update.lion_update_` and of every kernel that can replace it."""

    def __call__(self, tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None: ...


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """``tensors`` with each DTensor replaced by this rank's local tensor, which shares its memory."""
    if PLAIN_TYPES.issuperset(map(type, tensors)):
        return tensors
    with torch.no_grad():
        return [local_tensor(tensor) for tensor in tensors]


def local_tensor(tensor: Any) -> Tensor:
    """This rank's local tensor if ``tensor`` is a DTensor, which shares its memory; else ``tensor``."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if is_traceable_wrapper_subclass(local):  # the address of its memory would be wrong or 0
        raise ValueError(
            f"tensors of type {type(local).__name__} are not supported: they are wrappers without their own memory. "
            "Use plain tensors or DTensors of plain tensors"
        )
    return cast(Tensor, local)


def _check_digits(digits: list[Tensor], device: torch.device) -> None:
    for index, tensor in enumerate(digits):
        if (tensor.dtype, tensor.device) != (torch.uint8, device) or not tensor.is_contiguous():
            raise ValueError(
                f"digits[{index}] must be contiguous uint8 on {device}, got {tensor.dtype} on {tensor.device} with "
                f"strides {tensor.stride()}"
            )


def _kind_of(roles: dict[str, list[Tensor]]) -> StepKind:
    devices = set(map(_device, itertools.chain.from_iterable(roles.values())))
    if len(devices) > 1:
        raise ValueError(f"tensors of one update must be on one device, got {_names(devices)}")
    dtypes = {name: set(map(_dtype, tensors)) for name, tensors in roles.items()}
    for name, found in dtypes.items():
        if len(found) > 1:
            raise ValueError(f"{name} must have one dtype, got {_names(found)}")
    kind = StepKind(devices.pop(), **{name: found.pop() for name, found in dtypes.items()})
    for name, required in _required_dtypes(kind).items():
        if (dtype := getattr(kind, name)) != required:
            raise ValueError(f"{name} must be {required} here, got {dtype}")
    for name in ("masters", "grads", "exp_avgs", "model_copies"):
        dtype = getattr(kind, name)
        if not (dtype is None or dtype.is_floating_point or (name == "exp_avgs" and kind.scales is not None)):
            raise ValueError(f"{name} must be floating-point, got {dtype}; int8 momenta need scales")
    return kind


def _required_dtypes(kind: StepKind) -> dict[str, torch.dtype]:
    """Dtypes that packed state requires."""
    required: dict[str, torch.dtype] = {}
    if kind.remainders is not None:
        required |= {"masters": torch.bfloat16, "remainders": torch.int16}
    if kind.scales is not None:
        required |= {"exp_avgs": torch.int8, "scales": torch.bfloat16}
    return required


def _names(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def _int64(values: Iterable[int]) -> Tensor:
    """An int64 tensor of ``values``, which are at least one; much faster than torch.tensor of a list."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
