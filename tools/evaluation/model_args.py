"""Megatron's arguments that decide the function of a model: those that reach the model's configuration.

The list comes from the installed Megatron: the functions that make the configuration are run, and every argument that
they read counts. The patterns below exclude only arguments that say how the function is computed. So an unknown
argument comes from the checkpoint, or is refused by the export.
"""

import dataclasses
import sys
from fnmatch import fnmatch
from typing import Any

# How ranks share the work, in addition to the fields of Megatron's ModelParallelConfig.
LAYOUT = (
    "*pipeline*", "account_for_*", "*cp_comm_type*", "*dispatcher*", "*overlap*", "*offload*", "*_a2a_*", "*deepep*",
    "moe_flex_*", "*hybridep*", "moe_ncclep_*", "moe_paged_stash*", "distribute_saved_activations", "symmetric_ar_type",
    "nccl_*",
)  # fmt: skip
# Kernels and precision: these change how a result is rounded.
ARITHMETIC = (
    "transformer_impl", "*attention_backend", "*attention_version", "*kernel_backend", "masked_softmax_fusion",
    "bias_dropout_fusion", "apply_rope_fusion", "mla_down_proj_fusion", "moe_permute_fusion", "moe_router_fusion",
    "no_persist_layer_norm", "fused_residual_*", "use_fused_*", "*_te_*", "te_precision_config_file", "*op_fuser",
    "*grouped_gemm*", "*kitchen*", "fp16", "bf16", "fp16_lm_cross_entropy", "fp4*", "fp8*", "first_last_layers_bf16",
    "num_layers_at_*_in_bf16", "disable_bf16_*", "batch_invariant_mode", "flash_decode", "deterministic_mode",
    "fp32_residual_connection", "*quantization*", "moe_router_padding_for_fp8", "use_mamba_mem_eff_path",
)  # fmt: skip
# Settings of training, of generation and of the machine.
ELSEWHERE = (
    "*_dropout", "*init_method*", "init_model_*", "seed", "test_mode", "*_loss_coeff", "*_loss_scaling_factor",
    "*_per_token_loss", "moe_z_loss_coeff", "moe_input_jitter_eps", "moe_per_layer_logging",
    "moe_router_load_balancing_type", "moe_router_bias_update_rate", "*_quantile_balancing_ema", "qk_clip*",
    "log_max_attention_logit", "*recompute*", "*cuda_graph*", "inference_*", "mlp_chunks_for_*", "config_logger_dir",
    "clone_scatter_*", "make_vocab_size_divisible_by", "padded_vocab_size", "cache_mla_latents",
)  # fmt: skip
# Used in launch/pretrain_gpt.py if Megatron's own loop does not build the model.
BEFORE_0_19 = (
    "position_embedding_type", "rotary_percent", "rotary_base", "use_rope_scaling", "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor", "max_position_embeddings", "untie_embeddings_and_output_weights", "spec",
)  # fmt: skip


def function_args(saved: Any) -> list[str]:
    """Names of the arguments that decide the function of the model that ``saved`` arguments describe."""
    from megatron.core.model_parallel_config import ModelParallelConfig

    others = (*(field.name for field in dataclasses.fields(ModelParallelConfig)), *LAYOUT, *ARITHMETIC, *ELSEWHERE)
    return [name for name in _read_by_the_configuration(saved) if not _matches(name, others)]


def arithmetic(args: Any) -> dict[str, str]:
    """How the function is computed: kernels and precision, where they are not the defaults."""
    usual = default_args()
    return {
        name: str(getattr(args, name))
        for name in _read_by_the_configuration(args)
        if _matches(name, ARITHMETIC) and getattr(args, name, None) != getattr(usual, name, None)
    }


def default_args() -> Any:
    """Megatron's arguments where the command line is empty, before they are validated."""
    from megatron.training.arguments import parse_args

    given, sys.argv[1:] = sys.argv[1:], []
    try:
        return parse_args(ignore_unknown_args=True)
    finally:
        sys.argv[1:] = given


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


class _Recorder:
    """Arguments that record which of them are read. Those that name further files are not passed on."""

    HIDDEN = ("multi_latent_attention", "heterogeneous_layers_config_path", "te_precision_config_file", "spec")

    def __init__(self, args: Any) -> None:
        self._args, self.asked = args, dict[str, None]()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] = None
        return None if name in self.HIDDEN else getattr(self._args, name, None)


def _read_by_the_configuration(args: Any) -> list[str]:
    from megatron.core.transformer import MLATransformerConfig
    from megatron.training.arguments import core_transformer_config_from_args

    @dataclasses.dataclass
    class EveryField(MLATransformerConfig):
        """Has every field that a configuration can have, and checks none."""

        def __post_init__(self) -> None:
            pass

    recorder = _Recorder(args)
    config = core_transformer_config_from_args(recorder, EveryField)
    try:
        from megatron.training.argument_utils import gpt_config_from_args
    except ImportError:
        names = [*recorder.asked, *BEFORE_0_19]
    else:
        gpt_config_from_args(recorder, config)
        names = list(recorder.asked)
    return [name for name in names if hasattr(args, name)]
