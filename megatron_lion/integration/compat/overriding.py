"""Marks methods that override one of Megatron's."""

from typing import Any

from megatron_lion.integration.compat.checks import incompatible

# The names that each class marks; the tests compare them with Megatron's own.
OVERRIDDEN: dict[type, set[str]] = {}


class _Override:
    """Placeholder of a marked method until its class is created, which calls ``__set_name__``."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self._method)
        OVERRIDDEN.setdefault(owner, set()).add(name)
        bases = owner.__mro__[1:]
        if not any(name in vars(base) for base in bases):
            known = [base for base in bases if base.__module__.startswith("megatron.")]
            base = known[0] if known else bases[0]
            raise incompatible(f"{base.__module__}.{base.__qualname__} has no {name}, which {owner.__name__} overrides")


def overrides[Method](method: Method) -> Method:
    """Mark a method or property that overrides one of a base class.

    Raises LionError when the class is created if no base class has it, because Megatron would never call it. Must be
    the outermost decorator.
    """
    return _Override(method)  # type: ignore[return-value]
