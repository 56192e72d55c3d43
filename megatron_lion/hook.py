"""The opt-in import hook of ``megatron-lion enable``: every Megatron of this environment registers this package.

``enable`` writes one line into the environment's site-packages, which Python runs at start. The line installs a finder
that waits for Megatron's imports. Every interpreter of the environment imports this module, so its top imports only
``sys``.
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
# Python prints a traceback at every start if this line fails, so the line ignores a package that was uninstalled.
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


def pth_paths() -> "list[Path]":
    """Files where this interpreter looks for the hook's line: in site-packages and, if it is read, in the user's.

    pip installs into the user's site-packages if the environment's is not writable.
    """
    import site
    import sysconfig
    from pathlib import Path

    folders = [sysconfig.get_path("purelib")]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) / PTH_NAME for folder in folders]


def is_enabled() -> bool:
    """Whether the hook is set in this environment."""
    return any(path.is_file() for path in pth_paths())


def enable() -> "Path":
    """Set the hook. From the next interpreter on, ``--optimizer lion`` is this package's in this environment.

    Returns the file that was written. Raises OSError for site-packages if no folder can be written.
    """
    first, *others = pth_paths()
    try:
        first.write_text(PTH_LINE, encoding="utf-8")
        return first
    except OSError:
        for path in others:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(PTH_LINE, encoding="utf-8")
                return path
            except OSError:
                continue
        raise


def disable() -> "Path":
    """Remove the hook. Does nothing if it is not set. Returns the path of its file."""
    paths = pth_paths()
    found = [path for path in paths if path.is_file()]
    for path in found:
        path.unlink()
    return (found or paths)[0]


def install() -> None:
    """Start to wait for Megatron's imports in this interpreter. Calling it again does nothing."""
    if any(isinstance(finder, MegatronFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, MegatronFinder())
    previous = sys.excepthook

    def excepthook(kind: "type[BaseException]", error: BaseException, trace: "TracebackType | None") -> None:
        """Print our errors as one line, as megatron_lion.run does, and other errors as before."""
        config = sys.modules.get("megatron_lion.config")
        if config is not None and isinstance(error, config.LionError):
            from megatron_lion.run import report_error

            report_error(error)
        else:
            previous(kind, error, trace)

    sys.excepthook = excepthook


class MegatronFinder:
    """Lets three of Megatron's modules run our steps before or after they are executed.

    The steps run when a module is executed, not when it is searched, so asking whether a module exists registers
    nothing. The finder has no state, so threads may import at the same time.
    """

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of the other finders. For a module in ``STEPS`` its loader also runs the steps."""
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
