"""Lion for Megatron-Core.

``import megatron_lion`` needs torch alone. Megatron is imported when :func:`register` is called.
"""

from megatron_lion.config import LionError
from megatron_lion.lion import Lion

__version__ = "0.1.0"
__all__ = ["Lion", "LionError", "__version__", "register"]


def register() -> None:
    """Make ``--optimizer lion`` mean this package's Lion in the Megatron of this process.

    Call it before ``megatron.training.pretrain``. See :func:`megatron_lion.integration.register.register`.
    """
    from megatron_lion.integration.register import register as register_with_megatron

    register_with_megatron()
