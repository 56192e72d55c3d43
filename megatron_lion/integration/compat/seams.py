"""Names in Megatron that this package calls or relies on, and how each must look.

Two kinds of names declare their own check and are not in this table: functions that are replaced (``patching.wrap``)
and methods that our classes override (``overriding.overrides``).
"""

from megatron_lion.integration.compat.checks import Seam

# How every version before 0.19 spells the tensors of a distributed optimizer's state.
ADAM_STATE = ("param", "exp_avg", "exp_avg_sq")
# Names that the dataclass decorator writes into a class, except its constructor, and names that it reads there.
GENERATED = ("__repr__", "__eq__", "__match_args__")
_OF_A_DATACLASS = (*GENERATED, "__annotations__", "__dataclass_fields__", "__dataclass_params__")
_OPTIMIZER = "megatron.core.optimizer"
_CONFIG = "megatron.core.optimizer.optimizer_config"
_SHARDED = "megatron.core.optimizer.distrib_optimizer"
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
_FSDP = "megatron.core.distributed.fsdp.src.megatron_fsdp"
_CHECKPOINT = "megatron.core.dist_checkpointing"
CORE: tuple[Seam, ...] = (
    # Functions that build an optimizer look up the classes that ours replace.
    Seam(
        _OPTIMIZER,
        "_get_megatron_optimizer_based_on_param_groups",
        ("config", "model_chunks", "param_groups", "per_model_buffers"),
        uses=("SGD", "DistributedOptimizer", "HybridDeviceOptimizer"),
    ),
    Seam(_OPTIMIZER, "_get_megatron_optimizer_based_on_param_groups", ("param_groups",), uses=("Lion",), since="0.18"),
    Seam(_OPTIMIZER, "SGD", ("params", "lr", "momentum", "weight_decay")),
    Seam(_OPTIMIZER, "USING_PYTORCH_OPTIMIZER"),
    # The dataclass to which Lion's options are added (optimizer/config_fields.py), and the settings that Lion reads.
    Seam(
        _CONFIG,
        "OptimizerConfig.__init__",
        (
            "optimizer",
            "lr",
            "min_lr",
            "weight_decay",
            "decoupled_weight_decay",
            "bf16",
            "fp16",
            "use_distributed_optimizer",
            "use_precision_aware_optimizer",
            "store_param_remainders",
            "main_grads_dtype",
            "main_params_dtype",
            "exp_avg_dtype",
            "exp_avg_sq_dtype",
            "optimizer_cpu_offload",
        ),
    ),
    *(Seam(_CONFIG, f"OptimizerConfig.{name}") for name in _OF_A_DATACLASS),
    *(Seam(_CONFIG, f"OptimizerConfig.lion_beta{number}", since="0.17") for number in (1, 2)),
    *(
        Seam(_CONFIG, f"{name}OptimizerConfig.{generated}", until="0.17")
        for name in ("Adam", "SGD")
        for generated in ("__init__", *_OF_A_DATACLASS)
    ),
    # The chain, and the optimizers in it.
    Seam(_OPTIMIZER, "ChainedOptimizer.__init__", ("chained_optimizers",), uses=("chained_optimizers",)),
    Seam(_OPTIMIZER, "ChainedOptimizer.step", ("self",), uses=("clip_grad_by_total_norm_fp32", "get_grad_norm")),
    Seam(
        "megatron.core.optimizer.optimizer",
        "clip_grad_by_total_norm_fp32",
        ("parameters", "max_norm", "total_norm", "use_decoupled_grad"),
    ),
    Seam(
        "megatron.core.optimizer.clip_grads",
        "get_grad_norm_fp32",
        ("grads_for_norm", "norm_type", "grad_stats_parallel_group"),
        uses=("multi_tensor_applier", "l2_norm_impl"),
    ),
    Seam("megatron.core.optimizer.clip_grads", "l2_norm_impl"),
    Seam(_OPTIMIZER, "MegatronOptimizer.__init__", uses=("optimizer", "config", "init_state_fn")),
    Seam(_OPTIMIZER, "MegatronOptimizer.get_parameters", ("self",)),
    Seam(_OPTIMIZER, "MegatronOptimizer.get_grad_stats_parallel_group", ("self",)),
    Seam(_OPTIMIZER, "MegatronOptimizer.get_main_grads_for_grad_norm", ("self",), until="0.18"),
    Seam(_OPTIMIZER, "MegatronOptimizer.get_grads_for_grad_norm", ("self",), since="0.19"),
    Seam(
        _OPTIMIZER,
        "Float16OptimizerWithFloat16Params.__init__",
        uses=("float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups"),
    ),
    # The distributed optimizer: attributes that it sets and this package reads.
    Seam(
        _SHARDED,
        "DistributedOptimizer.__init__",
        ("optimizer", "config", "grad_scaler", "init_state_fn"),
        uses=(
            "HybridDeviceOptimizer",
            "buffers",
            "data_parallel_group",
            "ddp_config",
            "distributed_optimizer_instance_id",
            "is_stub_optimizer",
            "model_chunks",
            "model_float16_groups",
            "model_param_gbuf_map",
            "model_param_group_index_map",
            "shard_fp32_from_float16_groups",
        ),
    ),
    Seam(_SHARDED, "DistributedOptimizer.__init__", uses=("Adam",), until="0.18"),
    Seam(_SHARDED, "DistributedOptimizer._copy_model_grads_to_main_grads", ("self",), uses=("decoupled_grad",)),
    Seam(
        "megatron.core.optimizer.optimizer",
        "MixedPrecisionOptimizer.step_with_ready_grads",
        uses=("_copy_main_params_to_model_params",),
    ),
    Seam(_SHARDED, "DistributedOptimizer._copy_main_params_to_model_params", ("self",)),
    Seam(_SHARDED, "DistributedOptimizer.state_dict", ("self",), uses=("HAVE_APEX_OR_TE",)),
    Seam(_SHARDED, "DistributedOptimizer.load_state_dict", ("self", "state_dict"), uses=("HAVE_APEX_OR_TE",)),
    Seam(_SHARDED, "DistributedOptimizer._get_model_param_range_map", ("self", "param")),
    Seam(_SHARDED, "DistributedOptimizer._is_distopt_quantized_param", ("tensor",), since="0.18"),
    Seam(_SHARDED, "is_float8tensor", ("tensor",), until="0.17"),
    Seam(_SHARDED, "is_nvfp4tensor", ("tensor",), since="0.17"),
    Seam(_SHARDED, "DistributedOptimizer.get_parameter_state_dp_zero", ("self",), (ADAM_STATE,), until="0.18"),
    Seam(_SHARDED, "DistributedOptimizer.load_parameter_state_from_dp_zero", (), (ADAM_STATE,), until="0.18"),
    Seam(_SHARDED, "DistributedOptimizer.load_parameter_state_from_dp_zero_legacy", (), (ADAM_STATE,), until="0.18"),
    # The bugs that we repair must still exist: our repair would break a release that has its own.
    Seam(
        _SHARDED,
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        uses=("pad", "get_parameter_state_dp_zero"),
        until="0.19",
    ),
    Seam(_SHARDED, "DistributedOptimizer.sharded_param_state_dp_reshardable", ("self", "is_loading")),
    # Megatron-FSDP: torch, which the CPU replaces there, marks on the parameters, and the fp32 main weights.
    Seam("megatron.core.distributed.fsdp.mcore_fsdp_adapter", "torch"),
    Seam(f"{_FSDP}.megatron_fsdp", "torch"),
    Seam(f"{_FSDP}.param_and_grad_buffer", "_coalescing_manager"),
    Seam(_OPTIMIZER, "get_megatron_optimizer", uses=("use_megatron_fsdp", "ChainedOptimizer"), since="0.17"),
    Seam(_SHARDED, "DistributedOptimizer._param_name", ("self", "param"), since="0.17"),
    Seam(
        _SHARDED,
        "DistributedOptimizer._param_groups_to_param2group_meta",
        ("self", "param_groups"),
        uses=("_param_name",),
        since="0.17",
    ),
    Seam(
        f"{_FSDP}.param_and_grad_buffer",
        "ParamAndGradBuffer._init_optimizer_named_parameters",
        uses=("orig_param", "megatron_fsdp_slice", "megatron_fsdp_dist_index"),
        since="0.17",
    ),
    Seam(
        f"{_FSDP}.param_and_grad_buffer",
        "ParamAndGradBuffer.copy_main_weights_to_model_weights",
        uses=("parameter_groups", "main_weight_buffer"),
        since="0.17",
    ),
    Seam(_BUFFERS, "_ParamAndGradBuffer.__init__", uses=("buckets", "param_index_map", "params")),
    Seam(
        _BUFFERS,
        "_ParamAndGradBucket.__init__",
        uses=("grad_data", "numel_unpadded", "offset", "param_data", "params"),
    ),
    # Names that --lion-gather signs relies on.
    Seam(
        _BUFFERS,
        "_ParamAndGradBucketGroup.__init__",
        uses=(
            "buckets",
            "ddp_config",
            "intra_distributed_optimizer_instance_group",
            "param_gather_handle",
            "param_gather_dispatched",
        ),
    ),
    Seam(
        _BUFFERS,
        "_ParamAndGradBucketGroup.start_param_sync",
        ("force_sync",),
        uses=("param_gather_handle", "param_gather_dispatched"),
    ),
    Seam(
        _BUFFERS,
        "_ParamAndGradBucketGroup.finish_param_sync",
        uses=("param_gather_handle", "param_gather_dispatched", "start_param_sync", "wait"),
    ),
    Seam(_BUFFERS, "_ParamAndGradBucketGroup.finish_grad_sync", uses=("param_gather_dispatched",)),
    # What --lion-reduce relies on.
    Seam(
        _BUFFERS,
        "_ParamAndGradBucketGroup.start_grad_sync",
        ("force_all_reduce",),
        uses=("dist_reduce_scatter_func", "grad_reduce_handle", "grad_data", "_coalescing_manager"),
    ),
    Seam(_BUFFERS, "_ParamAndGradBucketGroup.finish_grad_sync", uses=("grad_reduce_handle", "start_grad_sync", "wait")),
    Seam(_BUFFERS, "_ParamAndGradBuffer.scale_gradients", ("scaling_factor",)),
    # Offload to the CPU.
    Seam(
        "megatron.core.optimizer.cpu_offloading",
        "HybridDeviceOptimizer.__init__",
        ("params", "offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls"),
    ),
    Seam(
        "megatron.core.optimizer.cpu_offloading",
        "HybridDeviceOptimizer._init_sub_optimizers",
        uses=("cpu_optimizers",),
    ),
    Seam("megatron.core.optimizer.cpu_offloading", "HybridDeviceOptimizer.sub_optimizers"),
    Seam(_OPTIMIZER, "HybridDeviceOptimizer._sync_sub_optimizers_state_to_hdo", ("self",), since="0.19"),
    Seam(_OPTIMIZER, "HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers", ("self",), since="0.19"),
    # Checkpoints, random states, metrics.
    Seam(_CHECKPOINT, "load_content_metadata", ("preloaded_state_dict",)),
    Seam(_CHECKPOINT, "load_tensors_metadata", ("checkpoint_dir",)),
    Seam(_CHECKPOINT, "check_is_distributed_checkpoint", ("checkpoint_dir",)),
    Seam("torch.distributed.checkpoint", "FileSystemReader._slice_file", ("self", "file", "sinfo")),
    Seam(f"{_CHECKPOINT}.mapping", "ShardedTensor", ("key", "data", "local_shape", "global_shape", "global_offset")),
    Seam("megatron.core.tensor_parallel.random", "_fork_rng"),
    Seam("megatron.core.rerun_state_machine", "get_rerun_state_machine"),
    Seam("megatron.core.rerun_state_machine", "RerunMode.DISABLED"),
    Seam("megatron.core.rerun_state_machine", "RerunStateMachine.__init__", uses=("mode",)),
    Seam(
        "megatron.core.transformer.moe.moe_utils",
        "get_moe_layer_wise_logging_tracker",
        uses=("_MOE_LAYER_WISE_LOGGING_TRACKER",),
        until="0.17",
    ),
    Seam("megatron.core.transformer.moe.moe_logging", "get_moe_metrics_tracker", since="0.18"),
    Seam("megatron.core.transformer.moe.moe_logging", "set_moe_metrics_tracker", ("tracker",), since="0.18"),
    Seam("megatron.core.transformer.moe.moe_logging", "MoEMetricsTracker", since="0.18"),
)
_LOOP = "megatron.training.training"
TRAINING: tuple[Seam, ...] = (
    Seam("megatron.training.arguments", "_print_args", ("title", "args")),
    Seam("megatron.training.checkpointing", "checkpoint_exists", ("checkpoints_path",)),
    Seam("megatron.training.checkpointing", "get_load_checkpoint_path_by_args", ("args",)),
    Seam("megatron.training.checkpointing", "get_checkpoint_name", ("tensor_rank", "pipeline_rank", "expert_rank")),
    *(Seam("megatron.training", f"get_{what}") for what in ("args", "timers", "tokenizer")),
    *(Seam("megatron.training", f"get_{what}_writer") for what in ("tensorboard", "wandb")),
    # Not in CORE: this module may be importing megatron.core.optimizer, with which CORE is checked.
    Seam(
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel.__init__",
        uses=("bucket_groups", "ddp_config", "expert_parallel_bucket_groups", "remove_forward_pre_hook_handles"),
    ),
    *(
        Seam("megatron.core.distributed.distributed_data_parallel", f"DistributedDataParallel.{name}", (parameter,))
        for name, parameter in {
            "zero_grad_buffer": "self",
            "disable_forward_pre_hook": "param_sync",
            "enable_forward_pre_hook": "self",
            "start_param_sync": "force_sync",
        }.items()
    ),
    Seam(
        "megatron.core.distributed.distributed_data_parallel_config",
        "DistributedDataParallelConfig.__init__",
        ("use_distributed_optimizer", "overlap_param_gather"),
    ),
    Seam(_OPTIMIZER, "ChainedOptimizer.prepare_model_params_for_param_sync", ("self",), since="0.19"),
    # Megatron's loop looks up the names that this package replaces.
    Seam(_LOOP, "setup_model_and_optimizer", uses=("get_megatron_optimizer", "get_megatron_optimizer_config")),
    Seam(_LOOP, "get_megatron_optimizer", ("config",)),
    # It copies Lion's options, which are fields.
    Seam(_LOOP, "get_megatron_optimizer_config", ("args",), uses=("fields", "OptimizerConfig"), since="0.18"),
    Seam(_LOOP, "pretrain", ("model_type", "forward_step_func"), uses=("initialize_megatron",)),
    Seam(_LOOP, "train", uses=("train_step", "post_training_step_callbacks")),
    Seam(
        "megatron.training.initialize",
        "initialize_megatron",
        ("parsed_args",),
        uses=("validate_args", "set_global_variables"),
        until="0.17",
    ),
)


def seams_of(*, training: bool) -> tuple[Seam, ...]:
    """The seams of this table that the installed Megatron needs, with or without those in its loop."""
    return tuple(seam for seam in CORE + (TRAINING if training else ()) if seam.is_needed)
