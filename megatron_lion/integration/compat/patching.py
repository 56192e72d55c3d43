"""Replaces names in Megatron, permanently or during one call."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_lion.integration.compat.checks import Seam
from megatron_lion.integration.compat.versions import TRAITS


@dataclass(frozen=True)
class Patch:
    """A function or method of Megatron that ``wrapper`` replaces, and how it must look."""

    seam: Seam
    wrapper: Callable[..., Any]

    def apply(self) -> None:
        """Replace it. Each call then comes as ``wrapper(stock, *args, **kwargs)``."""
        holder, name = self.seam.holder()
        stock, wrapper = getattr(holder, name), self.wrapper

        @functools.wraps(stock)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return wrapper(stock, *args, **kwargs)

        patched.wrapper = wrapper  # type: ignore[attr-defined]  # so that a test can tell ours
        if isinstance(holder, ModuleType):
            replace_everywhere(holder, name, patched)
        else:
            setattr(holder, name, patched)


def wrap(
    target: str,
    wrapper: Callable[..., Any],
    *,
    parameters: tuple[str, ...] = (),
    uses: tuple[Any, ...] = (),
    since: str = min(TRAITS),
    until: str = max(TRAITS),
) -> Patch:
    """Declare that ``wrapper`` replaces ``target``, such as ``"megatron.training.training:train_step"``.

    Nothing is replaced until registration has checked every declaration. For ``parameters``, ``uses``, ``since`` and
    ``until`` see :class:`Seam`.
    """
    module, _, name = target.partition(":")
    return Patch(Seam(module, name, parameters, uses, since, until), wrapper)


def replace_everywhere(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Replace ``module.name``, and every reference to it that another module took with ``from module import name``."""
    original = getattr(module, name)
    for holder in list(sys.modules.values()):
        if getattr(holder, "__dict__", {}).get(name) is original:
            setattr(holder, name, replacement)


@contextlib.contextmanager
def temporarily(holder: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``holder`` during a call into Megatron, and restore them afterwards.

    Raises AttributeError for an attribute that ``holder`` does not have.
    """
    old = {name: vars(holder)[name] for name in values if name in vars(holder)}
    for name, value in values.items():
        getattr(holder, name)
        setattr(holder, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in old:
                setattr(holder, name, old[name])
            else:  # it came from the class
                delattr(holder, name)
