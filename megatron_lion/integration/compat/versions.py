"""Supported versions of megatron-core, how they differ, and the installed one."""

import functools
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.config import LionError

INSTALL_HINT = "pip install 'megatron-core==0.19.2'"


@dataclass(frozen=True, kw_only=True)
class MegatronTraits:
    """How this package treats one minor version of megatron-core, and why."""

    tested: str
    """the release that the tests run; of one that is not released, the commit that was run by hand"""
    released: bool = True
    stock_lion: str
    """what it does with ``--optimizer lion`` without this package"""
    asks_for_state_keys: bool = True
    """its distributed optimizer asks which tensors a state has, and takes any optimizer that can make them; before
    0.19 it accepts only Adam, and its methods name Adam's two tensors"""
    has_fp4_parameters: bool = True
    """its optimizers know 4-bit parameters; from 0.17"""
    groups_quantized_parameters: bool = True
    """its quantized parameters may be grouped, which the distributed optimizer judges itself; from 0.18"""
    shifts_reshardable_state: bool = True
    """its ``fully_reshardable`` checkpoints of several buckets are corrupt (Megatron issue 5077, fixed in 0.20)"""
    gradients_of_the_norm: str = "get_grads_for_grad_norm"
    """the method of an optimizer for the gradients that it takes the norm of"""
    bert_replaces_in_one_order: bool = True
    """its BERT data set draws tokens from a sorted vocabulary; before 0.18 from one in each process's own order"""
    moe_metrics_are_objects: bool = True
    """the metrics of mixture-of-experts layers are kept in an object; before 0.18 in a dictionary"""
    sync_asks_optimizer: bool = True
    """the functions that gather overlapped parameters take the optimizer; from 0.19"""
    groups_are_found_by_rates: bool = True
    """a saved parameter group is found by its rates too; before 0.19 only by multipliers and kind"""
    waits_before_it_frees: bool = True
    """an interleaved pipeline frees an activation when it is sent; before 0.18 possibly earlier (4047)"""
    fsdp_strategies: tuple[str, ...] = ("no_shard", "optim", "optim_grads", "optim_grads_params")
    """the sharding strategies of its Megatron-FSDP with which Lion is supported; 0.16 was not run with any, and the
    first step of 0.17 with no_shard fails with any optimizer (param_and_grad_buffer 4225)"""
    reads_fsdp_command_line_first: bool = True
    """its loop reads the saved command line of a Megatron-FSDP checkpoint before the rest; from 0.19"""
    obeys_muon_scalar_optimizer: bool = True
    """it builds the optimizer of ``--muon-scalar-optimizer``; 0.18 has the flag and builds Adam"""
    has_a_wheel_with_a_loop: bool = True
    """its wheel holds ``megatron.training``; before 0.17 only a checkout does"""
    packed_batch_flag: str = "has_cu_seqlens"
    """the parameter for packed sequences of the function that broadcasts a batch"""
    loop_builds_gpt: bool = True
    """its loop builds a GPT from the command line; before 0.19 the script must pass a function that does"""
    loop_takes_arguments: bool = True
    """its loop accepts parsed arguments; before 0.18 it parses the command line itself"""


_IGNORED_BETAS = (
    "STOCK Megatron's: --lion-beta1/2 ignored, embeddings and 1-D parameters on Adam, no distributed optimizer"
)
TRAITS = {
    "0.16": MegatronTraits(
        tested="0.16.1",
        stock_lion="refused by stock Megatron",
        asks_for_state_keys=False,
        has_fp4_parameters=False,
        groups_quantized_parameters=False,
        gradients_of_the_norm="get_main_grads_for_grad_norm",
        bert_replaces_in_one_order=False,
        waits_before_it_frees=False,
        moe_metrics_are_objects=False,
        sync_asks_optimizer=False,
        groups_are_found_by_rates=False,
        fsdp_strategies=(),
        has_a_wheel_with_a_loop=False,
        reads_fsdp_command_line_first=False,
        obeys_muon_scalar_optimizer=False,
        loop_builds_gpt=False,
        loop_takes_arguments=False,
    ),
    "0.17": MegatronTraits(
        tested="0.17.1",
        stock_lion="refused by stock Megatron, after its parser has accepted it",
        asks_for_state_keys=False,
        groups_quantized_parameters=False,
        gradients_of_the_norm="get_main_grads_for_grad_norm",
        bert_replaces_in_one_order=False,
        waits_before_it_frees=False,
        moe_metrics_are_objects=False,
        sync_asks_optimizer=False,
        groups_are_found_by_rates=False,
        fsdp_strategies=("optim", "optim_grads", "optim_grads_params"),
        reads_fsdp_command_line_first=False,
        obeys_muon_scalar_optimizer=False,
        loop_builds_gpt=False,
        loop_takes_arguments=False,
    ),
    "0.18": MegatronTraits(
        tested="0.18.2",
        stock_lion=_IGNORED_BETAS,
        asks_for_state_keys=False,
        gradients_of_the_norm="get_main_grads_for_grad_norm",
        sync_asks_optimizer=False,
        groups_are_found_by_rates=False,
        packed_batch_flag="is_sft",
        reads_fsdp_command_line_first=False,
        obeys_muon_scalar_optimizer=False,
        loop_builds_gpt=False,
    ),
    "0.19": MegatronTraits(tested="0.19.2", stock_lion=_IGNORED_BETAS),
    # docs/results/megatron-lm.md records the runs.
    "0.20": MegatronTraits(
        tested="d98e8a64dd", released=False, stock_lion=_IGNORED_BETAS, shifts_reshardable_state=False
    ),
}
RELEASES = tuple(traits.tested for traits in TRAITS.values() if traits.released)
SUPPORTED = (
    ", ".join(f"{minor}.x" for minor, traits in TRAITS.items() if traits.released)
    + f" (tested: {', '.join(RELEASES)}), "
    + ", ".join(f"{minor} as developed ({traits.tested})" for minor, traits in TRAITS.items() if not traits.released)
)


def _spec_origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def megatron_path() -> Path | None:
    """The folder of the ``megatron.core`` that would be imported, without importing it. None if there is none."""
    origin = _spec_origin("megatron.core")
    return origin.parent if origin else None


def megatron_version() -> str | None:
    """The version of the ``megatron.core`` that would be imported, without importing it.

    None if there is none, "?" for each part that it does not state.
    """
    folder = megatron_path()
    return None if folder is None else version_at(folder)


@functools.cache  # asked for each micro-batch
def version_at(folder: Path) -> str:
    """The version of the ``megatron.core`` in ``folder``; "?" for each part that it does not state."""
    info = folder / "package_info.py"
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", text, flags=re.MULTILINE))
    return ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))


def minor_version() -> str:
    """The first two parts of :func:`megatron_version`. Empty if there is no Megatron."""
    return (megatron_version() or "").rpartition(".")[0]


def installed_traits() -> MegatronTraits:
    """The traits of the installed Megatron; those of the newest if its version is not in ``TRAITS``."""
    return TRAITS.get(minor_version(), list(TRAITS.values())[-1])


def has_training() -> bool:
    """Whether the installed ``megatron.core`` comes with ``megatron.training``, Megatron's own loop.

    ``megatron`` is a namespace, which may have another Megatron's loop behind a core without one.
    """
    core, training = megatron_path(), _spec_origin("megatron.training")
    return core is not None and training is not None and training.parent.parent == core.parent


def resiliency_problem() -> str | None:
    """Why the installed Megatron cannot be imported next to the installed nvidia-resiliency-ext, or None.

    megatron-core 0.18 and 0.19 read ``__version__`` of it at import, which releases up to 0.4.1 lack. Where that
    import has succeeded, there is no problem.
    """
    if "megatron.core.dist_checkpointing.strategies.torch" in sys.modules:
        return None
    folder = megatron_path()
    reader = folder / "dist_checkpointing" / "strategies" / "nvrx.py" if folder else None
    if reader is None or not reader.is_file() or "nvrx.__version__" not in reader.read_text(encoding="utf-8"):
        return None
    try:
        package = importlib.import_module("nvidia_resiliency_ext")
    except ImportError:
        return None
    if hasattr(package, "__version__"):
        return None
    return (
        f"megatron-core {megatron_version()} cannot be imported: it reads nvidia_resiliency_ext.__version__, which the "
        f"installed nvidia-resiliency-ext ({', '.join(package.__path__)}) lacks, like all releases up to 0.4.1. "
        "Run pip uninstall nvidia-resiliency-ext, and remove its folder: pip leaves it, and an empty one fails too. "
        "Or install 0.6.0, which megatron-core 0.19.2 asks for, from NVIDIA/nvidia-resiliency-ext on GitHub; in "
        "a read-only image with pip install --no-deps --target DIR, and DIR on PYTHONPATH"
    )


def require_supported_version() -> None:
    """Raise LionError if Megatron is missing, of an untested version, or cannot be imported for a known reason."""
    version = megatron_version()
    if version is None:
        raise LionError(
            f"megatron-core is not installed in {sys.prefix}: {INSTALL_HINT}, or put a Megatron-LM checkout on "
            "PYTHONPATH"
        )
    if minor_version() not in TRAITS:
        raise LionError(
            f"megatron-core {version} ({megatron_path()}) is not supported; supported: {SUPPORTED}. {INSTALL_HINT}"
        )
    if problem := resiliency_problem():
        raise LionError(problem)
