"""The opt-in import hook: ``megatron-lion enable`` makes every Megatron of this environment register by itself.

``enable`` writes one line into the environment's site-packages, which Python runs at start. It puts a finder in front
that waits for Megatron's imports. Every interpreter of the environment pays for this module, so it imports only ``sys``
at its top.
"""

import sys

TYPE_CHECKING = False  # typing's own costs an import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType, TracebackType
    from typing import Any

PTH_NAME = "megatron_lion_hook.pth"
# Python prints a traceback at every start if this line fails, so it passes over a package that is not there any more.
PTH_LINE = (
    r"""import sys; exec("try:\n import megatron_lion.hook\nexcept ModuleNotFoundError as error:\n """
    r"""if error.name != 'megatron_lion': raise\nelse:\n megatron_lion.hook.install()")"""
    "\n"
)
# Megatron's modules, and the functions of megatron_lion.integration.hooked to run before and after each is executed.
STEPS = {
    "megatron.core": ("before_core", None),
    "megatron.core.optimizer": (None, "after_optimizer"),
    "megatron.training": (None, "after_training"),
}


def pth_path() -> "Path":
    """Where the hook's line lives in this environment."""
    import sysconfig
    from pathlib import Path

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
    if any(isinstance(finder, MegatronFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, MegatronFinder())
    previous = sys.excepthook

    def excepthook(kind: "type[BaseException]", error: BaseException, trace: "TracebackType | None") -> None:
        """Our errors as one line, as megatron_lion.run prints them; everything else as before."""
        config = sys.modules.get("megatron_lion.config")
        if config is not None and isinstance(error, config.LionError):
            from megatron_lion.run import report_error

            report_error(error)
        else:
            previous(kind, error, trace)

    sys.excepthook = excepthook


class MegatronFinder:
    """Lets three of Megatron's modules run our steps before or after they are executed.

    The steps run at execution, not at the search: asking whether a module is there registers nothing. It keeps no
    state, so threads may import at once.
    """

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """What the other finders find; for one of ``STEPS`` with a loader that runs its steps too."""
        if fullname not in STEPS:
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, MegatronFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _run_around(spec.loader, *STEPS[fullname])
                return spec
        return None


def _run_around(loader: "Any", before: str | None, after: str | None) -> None:
    """Let ``loader`` run our steps around the execution of its module."""
    execute: Callable[[ModuleType], None] = loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        from megatron_lion.integration import hooked

        if before:
            getattr(hooked, before)()
        execute(module)
        if after:
            getattr(hooked, after)()

    loader.exec_module = exec_module
