"""Run by the import hook around Megatron's imports: registration, or a warning if it is not possible.

The hook sees every program of the environment. So a Megatron that this package does not support is left as it is, with
one warning, and only ``--optimizer lion`` is refused there: on the command line, and where an optimizer is built.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration import compat, console, register
from megatron_lion.integration.cpu import torch_cuda

# Why Lion is refused in this process, if it is.
_problem: LionError | None = None


def before_core() -> None:
    """Before ``megatron.core`` is executed: the version check and the CPU backend."""
    try:
        compat.require_supported_version()
    except LionError as error:
        _warn(error)
        return
    if torch_cuda.wanted():
        torch_cuda.replace_cuda()


def after_optimizer() -> None:
    """After ``megatron.core.optimizer`` is executed: the optimizer factory."""
    _register(register.register_core, "megatron.core.optimizer:get_megatron_optimizer")


def after_training() -> None:
    """After ``megatron.training`` is executed: the command line."""
    _register(register.register_training, "megatron.training.arguments:validate_args")


def _register(step: Callable[[], None], instead: str) -> None:
    """Run ``step``. If it or an earlier step fails, let ``instead`` refuse Lion."""
    if _problem is None:
        try:
            step()
            return
        except LionError as error:
            _warn(error)
    # Another Megatron may lack the module or the name: then it has no such way to ask for Lion.
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module(instead.partition(":")[0])
        compat.wrap(instead, _refuse_lion).apply()


def _refuse_lion(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if any(getattr(value, "optimizer", None) == "lion" for value in (*args, *kwargs.values())):
        raise LionError(f"--optimizer lion is not possible here: {_problem}")
    return stock(*args, **kwargs)


def _warn(error: LionError) -> None:
    global _problem
    _problem = error
    console.warn(f"{error}. Megatron runs without megatron-lion; --optimizer lion is refused")
