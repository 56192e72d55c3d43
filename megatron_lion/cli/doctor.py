"""``megatron-lion doctor``: which Megatron and which Lion a training command would use, and whether it would work."""

import ast
import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_lion import hook
from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.version import __version__

OURS = "megatron-lion, every parameter"


def main(script: Path | None = None, flags: list[str] | None = None, *, verbose: bool = False) -> int:
    """Print the report on ``torchrun script flags``, or on this environment. Issues no collective.

    Returns 0 if training with this Lion would work, else 1. The last line has the reason. Changes ``sys.path`` to the
    script's.
    """
    folder = script.resolve().parent if script else None
    elsewhere = _search_as(folder)
    _print_versions(elsewhere)
    problem = _first_problem(verbose)
    _print_which_lion(script, flags or [])
    if problem:
        print(f"\nNOT READY: {problem}")
        return 1
    print(
        "\nREADY: --optimizer lion would train every parameter with megatron-lion, by the commands above that say so. "
        "Other flags are checked when a run starts"
    )
    return 0


def _search_as(folder: Path | None) -> Path | None:
    """Set ``sys.path`` as ``torchrun SCRIPT`` does. ``folder`` is the script's.

    Returns another Megatron that ``torchrun -m megatron_lion.run SCRIPT`` would find: ``-m`` searches the current
    folder too, after the script's.
    """
    if not sys.flags.safe_path:
        del sys.path[0]  # this command's folder
    environment, start = sys.path[:], [str(folder)] if folder else []
    sys.path[:] = [*start, os.getcwd(), *environment]
    with_current_folder = compat.megatron_path()
    sys.path[:] = [*start, *environment]
    return None if with_current_folder == compat.megatron_path() else with_current_folder


def _row(name: str, value: str) -> None:
    print(f"{name:22} {value}")


def version_of(distribution: str) -> str | None:
    """The installed version. None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_versions(elsewhere: Path | None) -> None:
    _row("megatron-lion", f"{__version__} ({Path(__file__).parent.parent})")
    _row("python", f"{platform.python_version()} ({sys.prefix})")
    _row("torch", version_of("torch") or "missing")
    core, used = compat.megatron_version(), compat.megatron_path()
    _row("megatron-core", f"{core} ({used})" if core else "missing")
    for path in dict.fromkeys(Path(entry) / "megatron" / "core" for entry in sys.path):
        if (path / "package_info.py").is_file() and used and not path.samefile(used):
            _row("  not used", f"{compat.version_at(path)} ({path}), which comes later on the path")
    if elsewhere:
        _row("  in this folder", f"torchrun -m megatron_lion.run uses {compat.version_at(elsewhere)} ({elsewhere})")
    _row(
        "megatron.training",
        "found" if compat.has_training() else "not in this Megatron: core-level training loops only",
    )
    _print_fused_kernels(version_of("transformer-engine"), _has_nvidia_apex())
    _row("emerging-optimizers", version_of("emerging-optimizers") or "not installed (not needed)")


def _print_fused_kernels(te: str | None, apex: bool) -> None:
    """Transformer Engine and Apex, which change Megatron's layers and its gradient norm (clip_grads 11)."""
    _row("transformer-engine", te or "not installed: Megatron needs --transformer-impl local")
    needed = "--no-gradient-accumulation-fusion" + ("" if te else " --no-persist-layer-norm")
    _row("apex (NVIDIA's)", "found" if apex else f"not installed: Megatron needs {needed}")
    if os.environ.get("MEGATRON_LION_DEVICE") == "cpu":
        _row("", "MEGATRON_LION_DEVICE=cpu sets these flags")
    norm = "Transformer Engine's kernels" if te else "Apex's kernels" if apex else "torch, which is slower"
    _row("", f"Lion's step uses neither. Megatron's gradient norm and clip use {norm}")


def _has_nvidia_apex() -> bool:
    """Whether NVIDIA's Apex is installed. PyPI's "apex" is another project, without ``apex.optimizers``."""
    try:
        return importlib.util.find_spec("apex.optimizers") is not None
    except ModuleNotFoundError:
        return False


def _first_problem(verbose: bool) -> str | None:
    """Check device, version and Megatron's names in the order in which a run would meet them; None if all is well."""
    try:
        import torch

        from megatron_lion.integration.cpu import torch_cuda

        on_cpu, on_gpu = torch_cuda.wanted(), torch.cuda.is_available()
        if on_gpu:
            _row("device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
        else:
            _row("device", f"CPU ({torch_cuda.DEVICE_VARIABLE}=cpu)" if on_cpu else "no GPU")
        compat.require_supported_version()
        if on_cpu:
            torch_cuda.replace_cuda()
        _check_seams(verbose)
        torch_cuda.require_device()
    except (LionError, ImportError) as error:
        return str(error)
    return None


def _check_seams(verbose: bool) -> None:
    from megatron_lion.integration import register

    training = compat.has_training()
    with _quiet():
        compat.require(compat.seams_of(training=training))
        problems = {seam: seam.problem() for seam in register.seams(training=training)}
    failed = [seam for seam, problem in problems.items() if problem]
    count = f"{len(failed)} of {len(problems)} checks failed" if failed else f"all {len(problems)} checks passed"
    _row("compatibility", count + ("" if verbose or failed else " (--verbose lists them)"))
    for seam in problems if verbose else failed:
        _row("  failed" if seam in failed else "  ok", f"{seam.module}.{seam.name}")
    with _quiet():
        register.require_known_megatron(training=training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of Megatron's imports about packages that the report already lists."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _print_which_lion(script: Path | None, flags: list[str]) -> None:
    name = str(script or "pretrain_gpt.py")
    print("\nWhich Lion --optimizer lion is:")
    if script and _imports_us(script):
        commands = {f"torchrun {name}": f"{OURS}, if the script registers it, as its imports suggest"}
    else:
        enabled = f"{_stock_lion()} (`megatron-lion enable` makes it megatron-lion)"
        commands = {
            f"torchrun {name}": OURS if hook.is_enabled() else enabled,
            f"torchrun -m megatron_lion.run {name}": OURS,
        }
    if script is None:
        commands |= {"torchrun launch/pretrain_gpt.py": OURS, "a script that calls megatron_lion.register()": OURS}
    width = max(map(len, commands))
    for command, which in commands.items():
        print(f"  {command:{width}} {which}")
    if script is None:
        print("A Megatron in the script's folder comes first: `megatron-lion doctor SCRIPT` looks there.")
    elif (optimizer := _optimizer_in(flags)) != "lion":
        print(f"This command's optimizer is {optimizer}, so it does not use Lion: add --optimizer lion.")
    print("A run with megatron-lion has this line in its log: `megatron-lion: lion on N of N parameters`.")


def _imports_us(script: Path) -> bool:
    """Whether the source of ``script`` imports this package."""
    try:
        tree = ast.parse(script.read_bytes())
    except SyntaxError:
        return False
    nodes = list(ast.walk(tree))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.partition(".")[0] == "megatron_lion" for name in names)


def _optimizer_in(flags: list[str]) -> str:
    """The value of the last --optimizer in ``flags``; Megatron's default is adam."""
    value = "adam"
    for flag, following in zip(flags, [*flags[1:], ""], strict=True):
        if flag == "--optimizer":
            value = following
        elif flag.startswith("--optimizer="):
            value = flag.partition("=")[2]
    return value


def _stock_lion() -> str:
    """What stock Megatron does with ``--optimizer lion``, by version (read from its releases)."""
    return "none" if compat.megatron_version() is None else compat.installed_traits().stock_lion
