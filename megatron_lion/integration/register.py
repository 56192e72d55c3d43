"""Registration: the one call after which Megatron's ``--optimizer lion`` is ours."""

from megatron_lion.integration import compat
from megatron_lion.integration.cpu import torch_cuda

_done: set[str] = set()


def register() -> None:
    """Make ``--optimizer lion`` mean this package's Lion in this process. Calling it again does nothing.

    Replaces, after checking that each is what this package knows: the parser's set-up and validation in
    ``megatron.training.arguments``, the first read of a checkpoint, and ``get_megatron_optimizer`` wherever it was
    imported. With ``MEGATRON_LION_DEVICE=cpu`` it first lets Megatron run without a GPU. SGD and Adam are
    touched only where stock Megatron refuses or cannot resume them (docs/sgd-and-adam.md). Issues no collective.

    Raises:
        LionError: Megatron is missing, of an unsupported version or changed; the CPU was asked for beside a GPU.
    """
    before_megatron()
    has_training = compat.has_training()
    if not _done:  # every seam before the first replacement: never half-patched
        compat.require_seams(training=has_training)
    register_core()
    if has_training:
        register_training()


def before_megatron() -> None:
    """What must happen before Megatron is first imported: the version check and the CPU backend."""
    compat.require_supported_version()
    if torch_cuda.wanted():
        torch_cuda.replace_cuda()


def register_core() -> None:
    """The optimizer factory in ``megatron.core``."""
    if "core" in _done:
        return
    compat.require_seams(training=False)
    from megatron_lion.integration.cpu import megatron_patches
    from megatron_lion.integration.optimizer import factory

    factory.install()
    if torch_cuda.wanted():
        megatron_patches.adapt_core()
    _done.add("core")


def register_training() -> None:
    """The command line of ``megatron.training``, and what its start-up asks of the wheel."""
    if "training" in _done:
        return
    compat.require_seams(training=True)
    from megatron_lion.integration.checkpoint import integrity, ownership
    from megatron_lion.integration.cpu import megatron_patches
    from megatron_lion.integration.flags import arguments
    from megatron_lion.integration.optimizer import factory
    from megatron_lion.integration.reporting import step_telemetry
    from megatron_lion.integration.reporting.norm_ratio import schedule

    arguments.install()
    factory.install_config()
    ownership.install()
    integrity.install()
    schedule.install()
    step_telemetry.install()
    compat.allow_wheel_without_makefile()
    if torch_cuda.wanted():
        megatron_patches.adapt_training()
    _done.add("training")
