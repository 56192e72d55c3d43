"""Lion for Megatron-Core.

``import megatron_lion`` imports no other package. :class:`Lion` imports torch when it is first used, :func:`register`
and :class:`Reports` import Megatron. So the import hook of ``megatron-lion enable`` costs almost nothing in programs
that do not train.
"""

from megatron_lion.version import __version__

TYPE_CHECKING = False  # typing's own costs an import
if TYPE_CHECKING:
    from typing import Any

    from megatron_lion.config import LionError, NormRatioOptions
    from megatron_lion.integration.reporting.reports import Reports
    from megatron_lion.lion import Lion

__all__ = ["Lion", "LionError", "NormRatioOptions", "Reports", "__version__", "register"]
# Names that are imported on first use, and their modules.
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
