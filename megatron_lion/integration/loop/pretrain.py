"""Version-specific entry points to Megatron's training loop, for the scripts in launch/."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration.compat.patching import temporarily
from megatron_lion.integration.compat.versions import INSTALL_HINT, has_training, installed_traits, megatron_version

# Flags that the GPT builder below does not support. It is for versions with a loop that has no builder.
OLDER_GPT_LEAVES_OUT = ("spec", "heterogeneous_layers_config_path", "experimental_attention_variant", "yaml_cfg")


def parse_and_validate_args(args_defaults: dict[str, Any]) -> Any:
    """Megatron's arguments from the command line, validated, and made its global ones.

    Before 0.18 the loop parses by itself and gives no access to the arguments, so this repeats 0.18's function
    (arguments 98). Raises LionError where Megatron has no loop, and for a file of arguments.
    """
    if not has_training() or not installed_traits().has_a_wheel_with_a_loop:
        raise LionError(
            f"megatron-core {megatron_version()} is released without Megatron's own loop: use 0.17.1 or later, or run "
            "a Megatron-LM checkout's own script, torchrun -m megatron_lion.run /path/to/Megatron-LM/pretrain_gpt.py"
        )
    import megatron.training.arguments as arguments

    if installed_traits().loop_takes_arguments:
        return arguments.parse_and_validate_args(args_defaults=args_defaults)
    import megatron.training.yaml_arguments as yaml_arguments
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    args = arguments.parse_args()
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
    validate = arguments.validate_args if args.yaml_cfg is None else yaml_arguments.validate_yaml
    validate(args, args_defaults)
    set_global_variables(args)
    return args


def require_a_loop_that_builds_gpt(what: str) -> None:
    """Raise LionError if ``what`` needs a loop that builds a GPT and the installed Megatron has none."""
    if not (has_training() and installed_traits().loop_builds_gpt):
        raise LionError(
            f"{what} needs a Megatron loop that builds a GPT from its arguments, 0.19 or later; this is "
            f"{megatron_version()}. {INSTALL_HINT}"
        )


def pretrain(
    args: Any,
    datasets_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    model_provider: Callable[..., torch.nn.Module] | None = None,
) -> None:
    """Megatron's ``pretrain`` with the arguments of :func:`parse_and_validate_args`; of a GPT, unless one is given."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain as stock_pretrain

    if model_provider is None and not installed_traits().loop_builds_gpt:
        model_provider = _older_gpt(args)
    kind = ModelType.encoder_or_decoder
    if not installed_traits().loop_takes_arguments:
        with _arguments_are_ready(args):
            stock_pretrain(datasets_provider, model_provider, kind, forward_step)
        return
    from megatron.training import argument_utils

    if installed_traits().loop_builds_gpt:
        model = argument_utils.gpt_config_from_args(args) if model_provider is None else None
        config = argument_utils.pretrain_cfg_container_from_args(args, model)
        stock_pretrain(config, datasets_provider, kind, forward_step, model_provider)
    else:
        config = argument_utils.pretrain_cfg_container_from_args(args)
        stock_pretrain(config, datasets_provider, model_provider, kind, forward_step)


@contextlib.contextmanager
def _arguments_are_ready(args: Any) -> Iterator[None]:
    """Let 0.17's ``initialize_megatron`` use ``args`` instead of parsing and validating again."""
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    done = {name: lambda *_, **__: None for name in ("validate_args", "set_global_variables")}
    stock_initialize = functools.partial(training.initialize_megatron, parsed_args=args)
    with (
        temporarily(args, use_checkpoint_args=False),
        temporarily(initialize, **done),
        temporarily(training, initialize_megatron=stock_initialize),
    ):
        yield


def _older_gpt(args: Any) -> Callable[..., torch.nn.Module]:
    """The GPT that the command line describes, dense or with experts, as Megatron-LM's gpt_builders.py makes it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training.arguments import core_transformer_config_from_args

    for name in OLDER_GPT_LEAVES_OUT:
        if getattr(args, name, None):
            raise LionError(
                f"--{name.replace('_', '-')} is not supported with megatron-core {megatron_version()}: its wheel "
                "builds no model. Run Megatron-LM's own script with torchrun -m megatron_lion.run"
            )

    def gpt(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **given: Any) -> Any:
        config = given.get("config") or core_transformer_config_from_args(args)
        layers = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
        return GPTModel(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            vp_stage=vp_stage,
            pg_collection=given.get("pg_collection"),
        )

    return gpt


def bert_dataset() -> Any:
    """Megatron's data set of masked sentences, as 0.18 has it.

    Before, each process has its own order of the vocabulary (0.17.1: bert_dataset 57), so the tokens that replace
    masked ones change from run to run and from rank to rank.
    """
    from megatron.core.datasets import bert_dataset as stock

    if installed_traits().bert_replaces_in_one_order:
        return stock.BERTMaskedWordPieceDataset

    class BERTMaskedWordPieceDataset(stock.BERTMaskedWordPieceDataset):  # its index has the name
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.token_lookup.sort()

    return BERTMaskedWordPieceDataset


def batch_on_this_rank(data_iterator: Any, args: Any, keys: Sequence[str]) -> dict[str, torch.Tensor | None]:
    """The next micro-batch: read on the first tensor-parallel rank, broadcast to the others, cut for context parallel.

    Returns one entry for each of ``keys``, of shape [micro batch, sequence length] or None.
    """
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank

    if not installed_traits().loop_takes_arguments:
        from megatron.training.utils import get_batch_on_this_tp_rank as read_batch

        batch = get_batch_on_this_cp_rank(read_batch(data_iterator))
        return {key: batch[key] for key in keys}
    from megatron.core.utils import get_batch_on_this_tp_rank

    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items() if key in keys}
        batch = dict.fromkeys((*keys, "cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size")) | batch
    batch = get_batch_on_this_tp_rank(
        batch,
        **{installed_traits().packed_batch_flag: False},
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {key: batch[key] for key in keys}
