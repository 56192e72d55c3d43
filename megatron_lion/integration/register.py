"""Registration: the one call after which Megatron's ``--optimizer lion`` is ours."""

from megatron_lion.integration import compat, cpu_backend
from megatron_lion.integration.compat import Patch, Seam

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
    if not _done:  # every check before the first replacement: never half-patched
        require_known_megatron(training=has_training)
    register_core()
    if has_training:
        register_training()


def before_megatron() -> None:
    """What must happen before Megatron is first imported: the version check and the CPU backend."""
    compat.require_supported_version()
    if cpu_backend.wanted():
        cpu_backend.replace_cuda()


def register_core() -> None:
    """The optimizer factory in ``megatron.core``."""
    if "core" in _done:
        return
    require_known_megatron(training=False)
    for patch in _core_patches():
        patch.apply()
    if cpu_backend.wanted():
        from megatron_lion.integration import cpu_megatron

        cpu_megatron.silence_rng_warnings()
    _done.add("core")


def register_training() -> None:
    """The command line of ``megatron.training``, and what its start-up asks of the wheel."""
    if "training" in _done:
        return
    require_known_megatron(training=True)
    from megatron_lion.integration import damage

    for patch in _training_patches():
        patch.apply()
    damage.install()
    _done.add("training")


def require_known_megatron(*, training: bool) -> None:
    """Raise LionError where a name in Megatron that this package calls, replaces, overrides or reads has changed.

    The names that it calls come first: without them our classes, which override others, cannot be made.
    """
    compat.require(compat.seams_of(training=training))
    compat.require(seams(training=training))


def seams(*, training: bool) -> tuple[Seam, ...]:
    """Every name in Megatron that this package calls or replaces. Makes our classes, which check what they override."""
    patches = _core_patches() + (_training_patches() if training else [])
    return compat.seams_of(training=training) + tuple(patch.seam for patch in patches)


def _core_patches() -> list[Patch]:
    from megatron_lion.integration import cpu_megatron, factory

    return _needed([*factory.CORE, *(cpu_megatron.CORE if cpu_backend.wanted() else ())])


def _training_patches() -> list[Patch]:
    """In the order in which they wrap: of two around one function the later one is the outer one."""
    from megatron_lion.integration import arguments, checkpoints, cpu_megatron, factory, telemetry
    from megatron_lion.integration.norm_ratio import rounds

    ours = (arguments.TRAINING, factory.TRAINING, checkpoints.TRAINING, rounds.TRAINING, telemetry.TRAINING)
    on_cpu = cpu_megatron.TRAINING if cpu_backend.wanted() else ()
    return _needed([*(patch for patches in ours for patch in patches), compat.WHEEL_WITHOUT_MAKEFILE, *on_cpu])


def _needed(patches: list[Patch]) -> list[Patch]:
    return [patch for patch in patches if patch.seam.is_needed]
