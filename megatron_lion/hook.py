"""The opt-in import hook: ``megatron-lion enable`` makes every Megatron of this environment register by itself.

``enable`` writes one line into the environment's site-packages, which Python runs at start. It puts a finder in front
that waits for Megatron's imports: before ``megatron.core`` it checks the version, after ``megatron.core.optimizer`` and
``megatron.training`` it registers. An interpreter that never imports Megatron pays for one small import and no torch.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from megatron_lion.config import LionError
from megatron_lion.run import report_error as report_on_rank_0

PTH_NAME = "megatron_lion_hook.pth"
# Python prints a traceback at every start if this line fails, so it asks first whether the package is still there.
PTH_LINE = (
    "import importlib.util; "
    "importlib.util.find_spec('megatron_lion') and __import__('megatron_lion.hook').hook.install()\n"
)


def pth_path() -> Path:
    """Where the hook's line lives in this environment."""
    return Path(sysconfig.get_path("purelib")) / PTH_NAME


def is_enabled() -> bool:
    """Whether the hook is set in this environment."""
    return pth_path().is_file()


def enable() -> None:
    """Set the hook: from the next interpreter on, this environment's ``--optimizer lion`` is ours."""
    pth_path().write_text(PTH_LINE, encoding="utf-8")


def disable() -> None:
    """Take the hook away; nothing happens where it is not set."""
    pth_path().unlink(missing_ok=True)


def install() -> None:
    """Start to wait for Megatron's imports in this interpreter. Calling it again does nothing."""
    if not any(isinstance(finder, MegatronFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MegatronFinder())
        sys.excepthook = functools.partial(_report_once, sys.excepthook)


def _report_once(previous: Callable[..., None], kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Our errors as one line on rank 0, as megatron_lion.run prints them; everything else as before."""
    if isinstance(error, LionError):
        report_on_rank_0(error)
    else:
        previous(kind, error, trace)


class MegatronFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets three of Megatron's modules run our steps before or after they are executed.

    The steps run at execution, not at the search: asking whether a module is there registers nothing.
    """

    BEFORE: ClassVar = {"megatron.core": "before_megatron"}
    AFTER: ClassVar = {"megatron.core.optimizer": "register_core", "megatron.training": "register_training"}

    def __init__(self) -> None:
        self._asking_the_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        before, after = self.BEFORE.get(fullname), self.AFTER.get(fullname)
        if self._asking_the_others or not (before or after):
            return None
        self._asking_the_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking_the_others = False
        if spec is not None and spec.loader is not None:
            _run_around(spec.loader, before, after)
        return spec


def _run_around(loader: importlib.abc.Loader, before: str | None, after: str | None) -> None:
    """Let ``loader`` run our steps around the execution of its module."""
    execute: Callable[[ModuleType], None] = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        from megatron_lion.integration import register

        if before:
            getattr(register, before)()
        execute(module)
        if after:
            getattr(register, after)()

    loader.exec_module = exec_module  # type: ignore[method-assign]
