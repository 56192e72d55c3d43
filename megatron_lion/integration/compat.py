"""The only file that knows Megatron's versions and private names.

Each seam below is a name in Megatron that this package calls or replaces, with the parameters that it relies on. All
of them are checked before anything is replaced, so that another Megatron is refused by name, never half-patched.
"""

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_lion.config import LionError

SUPPORTED = "0.19"
INSTALL_HINT = "pip install 'megatron-core==0.19.2'"


@dataclass(frozen=True)
class Seam:
    """A callable in Megatron and the names of the parameters that this package passes to it or expects in it."""

    module: str
    name: str
    parameters: tuple[str, ...]

    def problem(self) -> str | None:
        """What is wrong with this seam in the Megatron that is installed, or None."""
        try:
            target: Any = importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.module} cannot be imported ({error}; pip install 'megatron-lion[train]' has what it needs)"
        for part in self.name.split("."):
            target = getattr(target, part, None)
        if target is None:
            return f"{self.module}.{self.name} is gone"
        found = tuple(inspect.signature(target).parameters)
        missing = [parameter for parameter in self.parameters if parameter not in found]
        return f"{self.module}.{self.name} has changed: no parameter {', '.join(missing)}" if missing else None


CORE_SEAMS = (
    Seam("megatron.core.optimizer", "get_megatron_optimizer", ("config", "model_chunks")),
    Seam("megatron.core.optimizer", "_get_megatron_emerging_optimizer", ("config", "model_chunks")),
    Seam("megatron.core.optimizer", "DistributedOptimizer", ("optimizer", "config", "grad_scaler", "init_state_fn")),
    Seam("megatron.core.optimizer", "ChainedOptimizer.get_grad_norm", ("self",)),
    Seam("megatron.core.optimizer", "ChainedOptimizer.step_with_ready_grads", ("self",)),
    Seam(
        "megatron.core.optimizer.optimizer",
        "clip_grad_by_total_norm_fp32",
        ("parameters", "max_norm", "total_norm", "use_decoupled_grad"),
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._copy_main_params_to_model_params",
        ("self",),
    ),
    Seam("megatron.core.optimizer", "SGD", ("params", "lr", "momentum", "weight_decay")),
    Seam("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.state_dict", ("self",)),
    Seam("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.load_state_dict", ("self", "state_dict")),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._get_model_param_range_map",
        ("self", "param"),
    ),
    Seam("megatron.core.tensor_parallel.random", "_fork_rng", ()),
    Seam("megatron.core.transformer.moe.moe_logging", "set_moe_metrics_tracker", ("tracker",)),
)
TRAINING_SEAMS = (
    Seam("megatron.training.arguments", "add_megatron_arguments", ("parser",)),
    Seam("megatron.training.arguments", "validate_args", ("args", "defaults")),
    Seam("megatron.training.arguments", "_print_args", ("title", "args")),
    Seam("megatron.training.checkpointing", "_load_base_checkpoint", ("load_dir", "args", "rank0")),
    Seam("megatron.training.training", "get_megatron_optimizer", ("config",)),
    Seam("megatron.training.training", "get_megatron_optimizer_config", ("args",)),
    Seam("megatron.training.training", "initialize_megatron", ("allow_no_cuda",)),
    Seam(
        "megatron.training.training", "build_train_valid_test_datasets", ("build_train_valid_test_datasets_provider",)
    ),
    Seam(
        "megatron.training.training",
        "train_step",
        ("forward_step_func", "data_iterator", "model", "optimizer", "config", "forward_backward_func", "iteration"),
    ),
    Seam("megatron.training.training", "post_training_step_callbacks", ("model", "optimizer", "iteration")),
    Seam("megatron.training.training", "should_disable_forward_pre_hook", ("args",)),
    Seam("megatron.training.training", "disable_forward_pre_hook", ("model_chunks", "optimizer")),
    Seam("megatron.training.training", "enable_forward_pre_hook", ("model_chunks",)),
    Seam("megatron.training.training", "force_param_sync", ("model_chunks", "optimizer")),
)


def _spec_origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def megatron_path() -> Path | None:
    """The folder of the ``megatron.core`` that would be imported, without importing it; None where there is none."""
    origin = _spec_origin("megatron.core")
    return origin.parent if origin else None


def megatron_version() -> str | None:
    """The version of the ``megatron.core`` that would be imported, without importing it.

    None where there is none, "?" for each part that it does not state.
    """
    folder = megatron_path()
    if folder is None:
        return None
    info = folder / "package_info.py"
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", text, flags=re.MULTILINE))
    return ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))


def has_training() -> bool:
    """Whether ``megatron.training``, Megatron's own loop, is there beside ``megatron.core``."""
    try:
        return importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        return False


def require_supported_version() -> None:
    """Raise LionError where Megatron is missing or of a version that this package was not tested with."""
    version = megatron_version()
    if version is None:
        raise LionError(
            f"megatron-core is not installed in {sys.prefix}: {INSTALL_HINT}, or put a Megatron-LM checkout on "
            "PYTHONPATH"
        )
    if not version.startswith(SUPPORTED + "."):
        raise LionError(
            f"megatron-core {version} ({megatron_path()}) is not supported; supported: {SUPPORTED}.x. {INSTALL_HINT}"
        )


def require_seams(seams: tuple[Seam, ...]) -> None:
    """Raise LionError naming every one of ``seams`` that is gone or changed in the installed Megatron."""
    problems = [problem for seam in seams if (problem := seam.problem())]
    if problems:
        raise LionError(
            f"megatron-core {megatron_version()} is not the one this package knows: {'; '.join(problems)}. "
            f"Nothing was changed. Supported: {SUPPORTED}.x ({INSTALL_HINT})"
        )


def replace_everywhere(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Replace ``module.name``, and every reference to it that another module took with ``from module import name``."""
    original = getattr(module, name)
    for holder in list(sys.modules.values()):
        if getattr(holder, "__dict__", {}).get(name) is original:
            setattr(holder, name, replacement)


@contextlib.contextmanager
def substituted(holder: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``holder`` during a call into Megatron, and put the old ones back whatever happens."""
    old = {name: vars(holder)[name] for name in values if name in vars(holder)}
    for name, value in values.items():
        setattr(holder, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in old:
                setattr(holder, name, old[name])
            else:  # it came from the class
                delattr(holder, name)


def allow_wheel_without_makefile() -> None:
    """Let training start from the wheel, which ships the compiled dataset helpers but no Makefile to compile them with.

    Stock runs ``make`` all the same and exits when it fails (0.19.2: initialize 178). A checkout, which has the
    Makefile, still compiles. Goes when the wheel's own loop starts without it.
    """
    import megatron.core.datasets.utils as dataset_utils

    stock_compile = dataset_utils.compile_helpers

    def compile_helpers() -> None:
        if (Path(dataset_utils.__file__).parent / "Makefile").is_file():
            stock_compile()

    dataset_utils.compile_helpers = compile_helpers


def without_step() -> contextlib.AbstractContextManager[None]:
    """Let DistributedOptimizer save and load an optimizer that has no ``step`` tensor.

    Where neither Transformer Engine nor Apex is installed, its ``state_dict`` (0.19.2: distrib_optimizer 837) and
    ``load_state_dict`` (1025) read torch Adam's ``step`` from every parameter's state. Lion and SGD have none. The
    other branch reads ``step`` from the groups, where it is there. Goes when Megatron asks the optimizer instead.
    """
    from megatron.core.optimizer import distrib_optimizer

    return substituted(distrib_optimizer, HAVE_APEX_OR_TE=True)


@contextlib.contextmanager
def folding_the_clip_factor(fold: Callable[[list[Any], float], bool]) -> Iterator[None]:
    """Offer each clip factor that Megatron is about to multiply into gradients to ``fold``, which may take it over.

    ``ChainedOptimizer.step`` (0.19.2: optimizer 1875) scales all gradients in place, one more read and write of each.
    """
    from megatron.core.optimizer import optimizer

    stock_clip = optimizer.clip_grad_by_total_norm_fp32

    def clip(parameters: list[Any], max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
        factor = float(max_norm / (total_norm + 1.0e-6))  # clip_grads 178
        if not fold(parameters, min(factor, 1.0)):
            stock_clip(parameters, max_norm, total_norm, use_decoupled_grad)

    with substituted(optimizer, clip_grad_by_total_norm_fp32=clip):
        yield


def set_precision_aware(config: Any) -> None:
    """Have DistributedOptimizer leave master weights and 16-bit parameters to the optimizer inside it.

    OptimizerConfig's own check (0.19.2: optimizer_config 430) allows that for Transformer Engine's Adam alone, so the
    fields are set after it. The second one is what all of Megatron's code asks.
    """
    config.use_precision_aware_optimizer = True
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True


def is_precision_aware(config: Any) -> bool:
    """Whether the optimizer inside DistributedOptimizer holds the master weights."""
    return bool(getattr(config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False))


def has_te_or_apex() -> bool:
    """Whether Megatron took its Adam and SGD from Transformer Engine or NVIDIA's Apex, not from torch."""
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    return not USING_PYTORCH_OPTIMIZER


def model_params_with_groups(part: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each of the model's parameters that an optimizer of Megatron's chain updates, with its parameter group.

    The distributed optimizer and the one with fp32 copies of 16-bit parameters hold the model's parameters beside the
    inner optimizer's; the fp32 one hands them over as they are.
    """
    groups = part.optimizer.param_groups
    if hasattr(part, "model_param_group_index_map"):
        yield from ((param, groups[index]) for param, (index, _) in part.model_param_group_index_map.items())
    elif hasattr(part, "float16_groups"):
        for half, full, group in zip(part.float16_groups, part.fp32_from_fp32_groups, groups, strict=True):
            yield from ((param, group) for param in (*half, *full))
    else:
        yield from ((param, group) for group in groups for param in group["params"])


def gradients_outside_the_norm(part: Any) -> list[Any]:
    """The gradients that an optimizer of Megatron's chain leaves out of the norm that it clips by."""
    if part.optimizer is None:
        return []
    seen = {id(grad) for grad in part.get_grads_for_grad_norm()}
    return [param.grad for param in part.get_parameters() if param.grad is not None and id(param.grad) not in seen]


def shard_range(part: Any, param: Any) -> tuple[int, int]:
    """Start and stop, in the flattened ``param``, of the shard that the distributed optimizer ``part`` holds here."""
    shard = part._get_model_param_range_map(param)["param"]
    return shard.start, shard.end


def rerun_disabled() -> contextlib.AbstractContextManager[None]:
    """Megatron's rerun state machine off, as in its own evaluation, without the line that ``set_mode`` logs."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

    return substituted(get_rerun_state_machine(), mode=RerunMode.DISABLED)


@contextlib.contextmanager
def moe_metrics_kept() -> Iterator[None]:
    """Let routers record their metrics elsewhere: the log's are summed up until they are printed."""
    from megatron.core.transformer.moe import moe_logging

    kept = moe_logging.get_moe_metrics_tracker()
    moe_logging.set_moe_metrics_tracker(moe_logging.MoEMetricsTracker())
    try:
        yield
    finally:
        moe_logging.set_moe_metrics_tracker(kept)


def forked_random_states() -> contextlib.AbstractContextManager[None]:
    """Put back the random states of torch, the device and Megatron's tensor-parallel tracker on leaving."""
    from megatron.core.tensor_parallel.random import _fork_rng

    return _fork_rng()
