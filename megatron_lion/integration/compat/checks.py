"""Compatibility checks of names in Megatron: how each must look, and the error for one that does not."""

import importlib
import inspect
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration.compat.versions import INSTALL_HINT, SUPPORTED, TRAITS, megatron_version, minor_version


@dataclass(frozen=True)
class Seam:
    """A function or class in Megatron.

    ``parameters`` are those that this package passes to it or expects in it. ``uses`` are the names that its code must
    look up or set at each call, and constants that must be in it: names that this package replaces, attributes that it
    reads. ``since`` and ``until`` are the first and the last version in which this package needs it.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    uses: tuple[Any, ...] = ()
    since: str = min(TRAITS)
    until: str = max(TRAITS)

    @property
    def is_needed(self) -> bool:
        """Whether this package needs it in the installed Megatron; an unknown version counts as the newest."""
        minor = minor_version() if minor_version() in TRAITS else max(TRAITS)
        return self.since <= minor <= self.until

    def holder(self) -> tuple[Any, str]:
        """The module or class that has it, and its name there. Raises AttributeError if the class is gone."""
        holder: Any = importlib.import_module(self.module)
        *classes, name = self.name.split(".")
        for part in classes:
            holder = getattr(holder, part)
        return holder, name

    def problem(self) -> str | None:
        """What is wrong with this seam in the Megatron that is installed, or None.

        Raises LionError for a package that fails when Megatron imports it: another Megatron would not help.
        """
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.module} cannot be imported ({error}; pip install 'megatron-lion[train]' has what it needs)"
        except Exception as error:  # whatever a package that Megatron imports may raise
            *_, last = traceback.extract_tb(error.__traceback__)
            raise LionError(
                f"{self.module} cannot be imported: {last.filename} raises {type(error).__name__}: {error}. Repair or "
                "uninstall the package that this file belongs to"
            ) from error
        try:
            holder, name = self.holder()
            target: Any = getattr(holder, name)
        except AttributeError:
            return f"{self.module}.{self.name} is gone"
        found = tuple(inspect.signature(target).parameters) if self.parameters else ()
        if missing := [parameter for parameter in self.parameters if parameter not in found]:
            return f"{self.module}.{self.name} has changed: no parameter {', '.join(missing)}"
        code = getattr(inspect.unwrap(target), "__code__", None)
        looked_up = set(_looked_up(code)) if code else set()
        if missing := [str(what) for what in self.uses if what not in looked_up]:
            return f"{self.module}.{self.name} has changed: it no longer uses {', '.join(missing)}"
        return None


def _looked_up(code: CodeType) -> Iterator[Any]:
    """The names and constants in ``code`` and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _looked_up(constant)
        else:
            yield constant


def require(seams: Iterable[Seam]) -> None:
    """Raise LionError naming every one of ``seams`` that is gone or changed in the installed Megatron.

    One missing package makes many imports fail, so a reason is named once, with the first module.
    """
    problems: dict[str, str] = {}
    for seam in seams:
        if problem := seam.problem():
            problems.setdefault(problem.partition(" cannot be imported ")[2] or problem, problem)
    if problems:
        raise incompatible("; ".join(problems.values()))


def incompatible(problem: str) -> LionError:
    """The error for a Megatron that has changed in a place that this package relies on."""
    return LionError(
        f"megatron-core {megatron_version()} is incompatible with this megatron-lion: {problem}. "
        f"Nothing was changed. Supported: {SUPPORTED}; {INSTALL_HINT}"
    )
