"""``megatron-lion doctor``: which Lion a training run in this environment would use, and whether it would work."""

import contextlib
import importlib.metadata
import importlib.util
import io
import platform
import sys
import warnings
from collections.abc import Iterator

from megatron_lion import hook
from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.version import __version__


def main() -> int:
    """Print the report. Returns 0 where training with this Lion would work, else 1, the reason being the last line."""
    _print_versions()
    problem = _first_problem()
    _print_which_lion()
    if problem:
        print(f"\nNOT READY: {problem}")
        return 1
    print("\nREADY: --optimizer lion would train every parameter with megatron-lion as said above")
    return 0


def _row(name: str, value: str) -> None:
    print(f"{name:22} {value}")


def version_of(distribution: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_versions() -> None:
    _row("megatron-lion", __version__)
    _row("python", f"{platform.python_version()} ({sys.prefix})")
    _row("torch", version_of("torch") or "missing")
    core = compat.megatron_version()
    _row("megatron-core", f"{core} ({compat.megatron_path()})" if core else "missing")
    _row(
        "megatron.training",
        "there" if compat.has_training() else "not in this Megatron: core-level training loops only",
    )
    _row("transformer-engine", version_of("transformer-engine") or "not installed")
    _row("apex (NVIDIA's)", "there" if _has_nvidia_apex() else "not installed")
    _row("emerging-optimizers", version_of("emerging-optimizers") or "not installed (not needed)")


def _has_nvidia_apex() -> bool:
    """PyPI's "apex" is another project: NVIDIA's is known by its optimizers."""
    try:
        return importlib.util.find_spec("apex.optimizers") is not None
    except ModuleNotFoundError:
        return False


def _first_problem() -> str | None:
    """Check device, version and seams in the order in which a run would meet them; None where all is well."""
    try:
        import torch

        from megatron_lion.integration.cpu import torch_cuda

        on_cpu, on_gpu = torch_cuda.wanted(), torch.cuda.is_available()
        use_cpu = f"{torch_cuda.DEVICE_VARIABLE}=cpu"
        if on_gpu:
            _row("device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
        else:
            _row("device", f"CPU ({use_cpu})" if on_cpu else "no GPU")
        compat.require_supported_version()
        if on_cpu:
            torch_cuda.replace_cuda()
        _check_seams()
    except (LionError, ImportError) as error:
        return str(error)
    if not (on_cpu or on_gpu):
        return f"no GPU is visible to torch {torch.__version__}; to train on the CPU set {use_cpu}"
    return None


def _check_seams() -> None:
    from megatron_lion.integration import register

    training = compat.has_training()
    compat.require(compat.seams_of(training=training))
    with _quiet():
        problems = {seam: seam.problem() for seam in register.seams(training=training)}
    for seam, problem in problems.items():
        _row("seam", f"{'ok ' if problem is None else 'BAD'} {seam.module}.{seam.name}")
    register.require_known_megatron(training=training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron's imports warn about packages that a user of this report has just read about."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _print_which_lion() -> None:
    print("\nWhich Lion --optimizer lion is:")
    ours = "megatron-lion, every parameter"
    plain = ours if hook.is_enabled() else f"{_stock_lion()} (`megatron-lion enable` makes it megatron-lion)"
    for command, which in (
        ("torchrun pretrain_gpt.py", plain),
        ("torchrun -m megatron_lion.run pretrain_gpt.py", ours),
        ("torchrun launch/pretrain_gpt.py", ours),
        ("a script that calls megatron_lion.register()", ours),
    ):
        print(f"  {command:46} {which}")
    print("A run of ours says so in its log: `megatron-lion: lion on N of N parameters`.")


def _stock_lion() -> str:
    """What Megatron does with ``--optimizer lion`` by itself, by version (read from its releases)."""
    return "none" if compat.megatron_version() is None else compat.installed_traits().stock_lion
