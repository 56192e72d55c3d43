"""How a name in Megatron is replaced: for good, or during one call."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


def replace_everywhere(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Replace ``module.name``, and every reference to it that another module took with ``from module import name``."""
    original = getattr(module, name)
    for holder in list(sys.modules.values()):
        if getattr(holder, "__dict__", {}).get(name) is original:
            setattr(holder, name, replacement)


@contextlib.contextmanager
def substituted(holder: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``holder`` during a call into Megatron, and put the old ones back whatever happens."""
    old = {name: vars(holder)[name] for name in values if name in vars(holder)}
    for name, value in values.items():
        setattr(holder, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in old:
                setattr(holder, name, old[name])
            else:  # it came from the class
                delattr(holder, name)
