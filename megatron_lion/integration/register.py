"""Registration: the one call that makes Megatron's ``--optimizer lion`` ours."""

from typing import Any

from megatron_lion.integration import compat
from megatron_lion.integration.compat import Patch, Seam
from megatron_lion.integration.cpu import torch_cuda

_done: set[str] = set()


def register() -> None:
    """Make ``--optimizer lion`` mean this package's Lion in this process. Calling it again does nothing.

    Checks every name in Megatron that it uses before it replaces the first one. Replaced are the parser's set-up and
    validation, the training step and the callbacks after it, the reading and writing of checkpoints, and
    ``get_megatron_optimizer`` wherever it was imported. Lion's options become fields of ``OptimizerConfig``. With
    ``MEGATRON_LION_DEVICE=cpu`` it first lets Megatron run without a GPU. SGD and Adam are changed only where stock
    Megatron refuses or cannot resume them (docs/sgd-and-adam.md). Issues no collective.

    Raises:
        LionError: Megatron is missing, of an unsupported version or changed; a subclass of ``OptimizerConfig`` exists
            already; the CPU was asked for on a machine with a GPU.
    """
    before_megatron()
    has_training = compat.has_training()
    if not _done:  # every check before the first replacement: never half-patched
        require_known_megatron(training=has_training)
    register_core()
    if has_training:
        register_training()


def before_megatron() -> None:
    """Before Megatron is first imported: the version check and the CPU backend."""
    compat.require_supported_version()
    if torch_cuda.wanted():
        torch_cuda.replace_cuda()


def register_core() -> None:
    """The optimizer factory and its configuration in ``megatron.core``."""
    if "core" in _done:
        return
    from megatron_lion.integration.optimizer import config_fields

    require_known_megatron(training=False)
    for patch in _core_patches():
        patch.apply()
    config_fields.install()
    if torch_cuda.wanted():
        from megatron_lion.integration.cpu import megatron_fsdp, megatron_patches

        megatron_patches.silence_rng_warnings()
        megatron_fsdp.run_on_cpu()
    _done.add("core")


def register_training() -> None:
    """The command line, the loop and the checkpoints of ``megatron.training``."""
    if "training" in _done:
        return
    require_known_megatron(training=True)
    from megatron_lion.integration import loop_callbacks
    from megatron_lion.integration.exchange import metrics as gather_metrics
    from megatron_lion.integration.exchange import reduce_metrics
    from megatron_lion.integration.reporting import step_telemetry
    from megatron_lion.integration.reporting.norm_ratio import schedule

    for patch in _training_patches():
        patch.apply()
    for reporter in (reduce_metrics, step_telemetry, schedule):
        loop_callbacks.before_step.append(reporter.before_step)
        loop_callbacks.after_step.append(reporter.after_step)
    loop_callbacks.after_step.append(gather_metrics.after_step)
    _done.add("training")


def require_known_megatron(*, training: bool) -> None:
    """Raise LionError where a name in Megatron that this package calls, replaces, overrides or reads has changed.

    The names that it calls come first: without them our classes, which override others, cannot be made.
    """
    compat.require(compat.seams_of(training=training))
    compat.require(seams(training=training))
    from megatron_lion.integration.optimizer import config_fields

    config_fields.refuse_earlier_subclasses()


def seams(*, training: bool) -> tuple[Seam, ...]:
    """Every name in Megatron that this package calls or replaces. Makes our classes, which check what they override."""
    patches = _core_patches() + (_training_patches() if training else [])
    return compat.seams_of(training=training) + tuple(patch.seam for patch in patches)


def _core_patches() -> list[Patch]:
    from megatron_lion.integration.checkpoint import core_load, fsdp_dtensor, integrity
    from megatron_lion.integration.cpu import megatron_fsdp, megatron_patches
    from megatron_lion.integration.optimizer import factory

    on_cpu = (*megatron_patches.CORE, *megatron_fsdp.CORE) if torch_cuda.wanted() else ()
    return _needed([*factory.CORE, *core_load.CORE, *fsdp_dtensor.CORE, *integrity.CORE, *on_cpu])


def _training_patches() -> list[Patch]:
    """Each function of Megatron is wrapped once."""
    from megatron_lion.integration import loop_callbacks
    from megatron_lion.integration.checkpoint import integrity, load_guard
    from megatron_lion.integration.cpu import megatron_patches
    from megatron_lion.integration.flags import arguments
    from megatron_lion.integration.optimizer import factory
    from megatron_lion.integration.reporting.norm_ratio import schedule

    modules: tuple[Any, ...] = (arguments, factory, load_guard, integrity, loop_callbacks, schedule)
    on_cpu = megatron_patches.TRAINING if torch_cuda.wanted() else ()
    return _needed(
        [*(patch for module in modules for patch in module.TRAINING), compat.WHEEL_WITHOUT_MAKEFILE, *on_cpu]
    )


def _needed(patches: list[Patch]) -> list[Patch]:
    return [patch for patch in patches if patch.seam.is_needed]
