"""Every name in Megatron that this package calls, replaces or relies on, and how each must look."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration.compat.versions import INSTALL_HINT, KNOWN, SUPPORTED, megatron_version, minor_version

# How every version before 0.19 spells the tensors of a distributed optimizer's state.
ADAM_STATE = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Seam:
    """A callable in Megatron.

    ``parameters`` are those that this package passes to it or expects in it. ``uses`` are the names that its code must
    look up at each call, where this package replaces them, and constants that must be in it. ``since`` and ``until``
    are the first and the last version in which this package needs it.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    uses: tuple[Any, ...] = ()
    since: str = min(KNOWN)
    until: str = max(KNOWN)

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
        if missing := [parameter for parameter in self.parameters if parameter not in found]:
            return f"{self.module}.{self.name} has changed: no parameter {', '.join(missing)}"
        code = getattr(inspect.unwrap(target), "__code__", None)
        looked_up = (*code.co_names, *code.co_consts) if code else ()
        if missing := [str(what) for what in self.uses if what not in looked_up]:
            return f"{self.module}.{self.name} has changed: it no longer uses {', '.join(missing)}"
        return None


_OPTIMIZER = "megatron.core.optimizer"
_SHARDED = "megatron.core.optimizer.distrib_optimizer"
CORE: tuple[Seam, ...] = (
    Seam(
        _OPTIMIZER,
        "get_megatron_optimizer",
        ("config", "model_chunks"),
        uses=("_get_megatron_optimizer_based_on_param_groups", "ChainedOptimizer", "log_single_rank"),
    ),
    Seam(
        _OPTIMIZER,
        "_get_megatron_optimizer_based_on_param_groups",
        ("config", "model_chunks", "param_groups", "per_model_buffers"),
        uses=("SGD", "DistributedOptimizer"),
    ),
    Seam(_OPTIMIZER, "_get_megatron_emerging_optimizer", ("config", "model_chunks"), since="0.18"),
    Seam(_OPTIMIZER, "DistributedOptimizer", ("optimizer", "config", "grad_scaler", "init_state_fn")),
    Seam(_OPTIMIZER, "ChainedOptimizer.__init__", ("chained_optimizers",)),
    Seam(_OPTIMIZER, "ChainedOptimizer.load_state_dict", ("state_dict",)),
    Seam(_OPTIMIZER, "ChainedOptimizer.get_grad_norm", ("self",)),
    Seam(_OPTIMIZER, "ChainedOptimizer.step_with_ready_grads", ("self",)),
    Seam(_OPTIMIZER, "ChainedOptimizer.step", ("self",), uses=("clip_grad_by_total_norm_fp32", "get_grad_norm")),
    Seam(
        "megatron.core.optimizer.optimizer",
        "clip_grad_by_total_norm_fp32",
        ("parameters", "max_norm", "total_norm", "use_decoupled_grad"),
    ),
    Seam(_OPTIMIZER, "HybridDeviceOptimizer._sync_sub_optimizers_state_to_hdo", ("self",), since="0.19"),
    Seam(_OPTIMIZER, "HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers", ("self",), since="0.19"),
    Seam(_OPTIMIZER, "SGD", ("params", "lr", "momentum", "weight_decay")),
    Seam(_SHARDED, "DistributedOptimizer.__init__", uses=("Adam",), until="0.18"),
    Seam(_SHARDED, "DistributedOptimizer._copy_main_params_to_model_params", ("self",)),
    Seam(_SHARDED, "DistributedOptimizer.state_dict", ("self",), uses=("HAVE_APEX_OR_TE",)),
    Seam(_SHARDED, "DistributedOptimizer.load_state_dict", ("self", "state_dict"), uses=("HAVE_APEX_OR_TE",)),
    Seam(_SHARDED, "DistributedOptimizer._get_model_param_range_map", ("self", "param")),
    Seam(_SHARDED, "DistributedOptimizer.get_parameter_state_dp_zero", ("self",), (ADAM_STATE,), until="0.18"),
    Seam(_SHARDED, "DistributedOptimizer.load_parameter_state_from_dp_zero", (), (ADAM_STATE,), until="0.18"),
    Seam(_SHARDED, "DistributedOptimizer.load_parameter_state_from_dp_zero_legacy", (), (ADAM_STATE,), until="0.18"),
    Seam(_OPTIMIZER, "MegatronOptimizer.get_main_grads_for_grad_norm", ("self",), until="0.18"),
    Seam(_OPTIMIZER, "MegatronOptimizer.get_grads_for_grad_norm", ("self",), since="0.19"),
    # What is repaired there must still be broken: a release that has the repair would be broken by ours.
    Seam(_SHARDED, "DistributedOptimizer.sharded_param_state_fully_reshardable", uses=("pad",), until="0.19"),
    Seam(_SHARDED, "DistributedOptimizer.get_parameter_state_dp_reshardable", ("self",)),
    Seam(_SHARDED, "DistributedOptimizer.sharded_param_state_dp_reshardable", ("self", "is_loading")),
    Seam("megatron.core.dist_checkpointing", "load_content_metadata", ("preloaded_state_dict",)),
    Seam("megatron.core.dist_checkpointing", "load_tensors_metadata", ("checkpoint_dir",)),
    Seam("megatron.core.tensor_parallel.random", "_fork_rng"),
    Seam("megatron.core.transformer.moe.moe_utils", "get_moe_layer_wise_logging_tracker", until="0.17"),
    Seam("megatron.core.transformer.moe.moe_logging", "set_moe_metrics_tracker", ("tracker",), since="0.18"),
)
_LOOP = "megatron.training.training"
TRAINING: tuple[Seam, ...] = (
    Seam("megatron.training.arguments", "add_megatron_arguments", ("parser",)),
    Seam("megatron.training.arguments", "validate_args", ("args", "defaults"), uses=("_print_args",)),
    Seam("megatron.training.arguments", "_print_args", ("title", "args")),
    Seam("megatron.training.checkpointing", "_load_base_checkpoint", ("load_dir", "args", "rank0")),
    Seam("megatron.training.checkpointing", "get_load_checkpoint_path_by_args", ("args",)),
    Seam("megatron.training.checkpointing", "get_checkpoint_name", ("tensor_rank", "pipeline_rank", "expert_rank")),
    Seam("megatron.training.checkpointing", "save_checkpoint", ("iteration", "model", "optimizer")),
    Seam("megatron.training.async_utils", "maybe_finalize_async_save", ("blocking",)),
    Seam("megatron.core.dist_checkpointing.strategies.torch", "_get_filesystem_reader", ("checkpoint_dir",)),
    Seam("torch.distributed.checkpoint", "FileSystemReader._slice_file", ("self", "file", "sinfo")),
    Seam(_LOOP, "setup_model_and_optimizer", uses=("get_megatron_optimizer", "get_megatron_optimizer_config")),
    Seam(_LOOP, "get_megatron_optimizer", ("config",)),
    Seam(_LOOP, "get_megatron_optimizer_config", ("args",)),
    Seam(_LOOP, "pretrain", ("model_type", "forward_step_func"), uses=("initialize_megatron",)),
    Seam(_LOOP, "initialize_megatron", ("allow_no_cuda",)),
    Seam(_LOOP, "build_train_valid_test_datasets", ("build_train_valid_test_datasets_provider",)),
    Seam(
        _LOOP,
        "train_step",
        ("forward_step_func", "data_iterator", "model", "optimizer", "config", "forward_backward_func", "iteration"),
    ),
    Seam(_LOOP, "train", uses=("train_step", "post_training_step_callbacks")),
    Seam(_LOOP, "post_training_step_callbacks", ("model", "optimizer", "iteration")),
    Seam(_LOOP, "should_disable_forward_pre_hook", ("args",)),
    Seam(_LOOP, "disable_forward_pre_hook", ("model_chunks",), until="0.18"),
    Seam(_LOOP, "disable_forward_pre_hook", ("model_chunks", "optimizer"), since="0.19"),
    Seam(_LOOP, "enable_forward_pre_hook", ("model_chunks",)),
    Seam(_LOOP, "force_param_sync", ("model_chunks",), until="0.18"),
    Seam(_LOOP, "force_param_sync", ("model_chunks", "optimizer"), since="0.19"),
)


def seams_of(*, training: bool) -> tuple[Seam, ...]:
    """The seams in the installed Megatron, with those in its loop or without; in an unknown one, the newest's."""
    minor = minor_version() if minor_version() in KNOWN else max(KNOWN)
    return tuple(seam for seam in CORE + (TRAINING if training else ()) if seam.since <= minor <= seam.until)


def require_seams(*, training: bool) -> None:
    """Raise LionError naming every seam that is gone or changed in the installed Megatron."""
    found = (seam.problem() for seam in seams_of(training=training))
    problems = dict.fromkeys(problem for problem in found if problem)  # a module that is gone is named once
    if problems:
        raise LionError(
            f"megatron-core {megatron_version()} is not the one this package knows: {'; '.join(problems)}. "
            f"Nothing was changed. Supported: {SUPPORTED}; {INSTALL_HINT}"
        )
