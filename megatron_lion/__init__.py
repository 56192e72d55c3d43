"""Lion for Megatron-Core.

``import megatron_lion`` imports nothing else: torch comes with :class:`Lion`, Megatron with :func:`register` and
:class:`Reports`. So the import hook that ``megatron-lion enable`` sets costs an interpreter that trains nothing almost
nothing.
"""

from megatron_lion.version import __version__

TYPE_CHECKING = False  # typing's own costs an import
if TYPE_CHECKING:
    from typing import Any

    from megatron_lion.config import LionError, NormRatioOptions
    from megatron_lion.integration.reporting.reports import Reports
    from megatron_lion.lion import Lion

__all__ = ["Lion", "LionError", "NormRatioOptions", "Reports", "__version__", "register"]
# Where each name is that is imported when it is first used.
_LAZY = {
    "Lion": "megatron_lion.lion",
    "LionError": "megatron_lion.config",
    "NormRatioOptions": "megatron_lion.config",
    "Reports": "megatron_lion.integration.reporting.reports",
}


def register() -> None:
    """Make ``--optimizer lion`` mean this package's Lion in the Megatron of this process.

    Call it before ``megatron.training.pretrain``. See :func:`megatron_lion.integration.register.register`.
    """
    from megatron_lion.integration.register import register as register_with_megatron

    register_with_megatron()


def __getattr__(name: str) -> "Any":
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
