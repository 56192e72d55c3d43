"""Real Megatron on gloo ranks, on a machine without a GPU: the replacements for CUDA, and nothing else.

Opt-in with ``MEGATRON_LION_DEVICE=cpu``, refused where a GPU is present. Megatron's own loop, parallelism,
checkpointing and distributed optimizer then run unmodified. Only calls that name the CUDA device go to the CPU.
``torch.cuda.is_available()`` stays False. Line numbers are megatron-core 0.19.2's.

There are two halves, because order matters: :func:`replace_cuda` runs before Megatron is first imported, the patches of
``megatron_patches`` after.
"""

import contextlib
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.data

from megatron_lion.config import LionError, check_choice

DEVICE_VARIABLE = "MEGATRON_LION_DEVICE"
CPU = torch.device("cpu")
META = torch.device("meta")
# The device that answers for CUDA.
_device = CPU

# Functions that make tensors where `device` says. Megatron passes "cuda" or torch.cuda.current_device() to these
# (clip_grads 108, optimizer 315, training 1131, schedules 2292, param_and_grad_buffer 1162).
FACTORIES = (
    "tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "randperm", "eye",
    "linspace", "tril_indices", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
)  # fmt: skip


def wanted() -> bool:
    """Whether ``MEGATRON_LION_DEVICE`` asks for the CPU. Raises LionError for a value other than cpu and cuda."""
    return check_choice(DEVICE_VARIABLE, os.environ.get(DEVICE_VARIABLE, "cuda").lower(), ("cpu", "cuda")) == "cpu"


def require_device() -> None:
    """Raise LionError if there is no GPU and the CPU was not asked for."""
    if not (wanted() or torch.cuda.is_available()):
        raise LionError(no_gpu())


def no_gpu() -> str:
    """Why torch sees no GPU, as far as it knows, and what to do."""
    built = "" if torch.version.cuda or torch.version.hip else ", which is built without CUDA"
    return (
        f"no GPU is visible to torch {torch.__version__}{built}. Set {DEVICE_VARIABLE}=cpu to train on the CPU, for "
        "tests and trials"
    )


def replace_cuda() -> None:
    """Answer torch's CUDA calls with the CPU, for this process and for good. Idempotent.

    Raises:
        LionError: a GPU is present (the replacements would hide it), or Megatron is already imported
            (it keeps what it imported from torch by name).
    """
    if torch.cuda.is_available():
        raise LionError(
            f"{DEVICE_VARIABLE}=cpu, but this machine has a GPU ({torch.cuda.get_device_name()}). Unset "
            f"{DEVICE_VARIABLE} to train on it, or hide it with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if getattr(torch.cuda, "_replaced_by_megatron_lion", False):
        return
    if any(name.startswith("megatron.core.") for name in sys.modules):
        raise LionError(
            f"{DEVICE_VARIABLE}=cpu must take effect before Megatron is imported: register megatron_lion first"
        )
    _replace_placement()
    _replace_cuda_module()
    _separate_data_loaders()
    # Megatron's jit_fuser is torch.compile, which would compile each fused function for seconds.
    torch._dynamo.config.disable = True
    torch.cuda._replaced_by_megatron_lion = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def answered_by(device: torch.device) -> Iterator[None]:
    """Make tensors that name CUDA on ``device``. On the meta device, also those that name no device.

    Tensors on meta have shapes and dtypes, and neither memory nor values.
    """
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def _without_cuda(device: Any) -> Any:
    """``device``, or its replacement if it names CUDA. Megatron names it by string, torch.device and index."""
    names_cuda = isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))
    return _device if names_cuda else device


def _replace_placement() -> None:
    """Tensors and modules sent to CUDA stay where they are."""

    def on_cpu_factory(make: Callable[..., Any]) -> Callable[..., Any]:
        follows_input = make.__name__.endswith("_like") or make.__name__ == "as_tensor"

        @functools.wraps(make)
        def factory(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None:
                kwargs["device"] = _without_cuda(kwargs["device"])
            elif _device is META and not follows_input:
                kwargs["device"] = META
            # Pinned memory speeds up copies to a GPU and needs one.
            kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return factory

    for name in FACTORIES:
        setattr(torch, name, on_cpu_factory(getattr(torch, name)))

    tensor_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], torch.Tensor):
            args = (_without_cuda(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _without_cuda(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    tensor_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        """Megatron tells fp32 from 16-bit parameters by comparing "torch.cuda.FloatTensor" (distrib_optimizer 401)."""
        if dtype is None:
            return tensor_type(self).replace("torch.meta.", "torch.", 1).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.Tensor.pin_memory = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]


class _Stream:
    """The CPU's one stream, on which everything is already in order."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_Event":
        return _Event()

    def synchronize(self) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """An event of that stream: over as soon as it is recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _replace_cuda_module() -> None:
    """``torch.cuda``'s own functions, answered by the CPU."""

    def answers(value: Any) -> Callable[..., Any]:
        """A new function each time: torch's compiler keeps a table of torch functions and refuses one twice."""
        return lambda *args, **kwargs: value

    # Compute capability 10: below it Megatron insists on CUDA_DEVICE_MAX_CONNECTIONS=1 (arguments 1414).
    properties = types.SimpleNamespace(name="cpu", major=10, minor=0, total_memory=0, multi_processor_count=1)
    stream = _Stream()
    replacements = {
        "current_device": lambda *args, **kwargs: _device,
        # With 0 devices Megatron skips model-parallel set-up and the RNG tracker (initialize 270, 447).
        "device_count": answers(1),
        "set_device": answers(None),
        # Megatron keeps such a context and enters it again.
        "device": contextlib.nullcontext,
        "get_device_properties": answers(properties),
        "get_device_capability": answers((properties.major, properties.minor)),
        "get_device_name": answers(properties.name),
        "synchronize": answers(None),
        "empty_cache": answers(None),
        "ipc_collect": answers(None),
        "Stream": _Stream,
        "Event": _Event,
        "stream": contextlib.nullcontext,
        "current_stream": answers(stream),
        "default_stream": answers(stream),
        "set_stream": answers(None),
        "memory_allocated": answers(0),
        "max_memory_allocated": answers(0),
        "memory_reserved": answers(0),
        "max_memory_reserved": answers(0),
        "device_memory_used": answers(0),
        "reset_peak_memory_stats": answers(None),
        "memory_stats": answers({}),
        # The CPU's generator stands in for the device's (random 118, 303, 490; checkpointing 417).
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": answers(None),
        "seed": torch.seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = replacements["get_rng_state"]  # type: ignore[assignment]


def _separate_data_loaders() -> None:
    """Give every data loader its own random generator, seeded as torch's is.

    On a GPU dropout draws from the device's generator and a new loader draws its seed from the CPU's. Here the two are
    one, so the loader that a resumed run makes after it has restored the generator would shift dropout's draws. The
    seed is read and nothing is drawn. A restored state has the seed of the run that saved it.
    """
    stock_init = torch.utils.data.DataLoader.__init__
    signature = inspect.signature(stock_init)

    def init(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("generator") is None:
            given.arguments["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        stock_init(*given.args, **given.kwargs)

    torch.utils.data.DataLoader.__init__ = init  # type: ignore[method-assign]
