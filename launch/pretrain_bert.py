"""Pretrain a BERT with Megatron's own loop; needs nothing but the megatron-core wheel and this package.

    torchrun --nproc-per-node 8 launch/pretrain_bert.py --optimizer lion --lr 1e-5 <Megatron's own flags>

Every flag is Megatron's (--help lists them). The model is Megatron-Core's BertModel, the data its
BERTMaskedWordPieceDataset over sentences (tools/prepare_text.py --split-sentences). The loss is that of the masked
tokens plus that of the sentences' order; both are logged ("lm loss", "sop loss"), and their sum ("loss").
"""

from functools import partial
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration.loop.script_support import check_loss, dataset_options, parse_command_line
from megatron_lion.run import readable_errors

BATCH_KEYS = ("text", "types", "labels", "is_random", "loss_mask", "padding_mask")

# Flags that do not apply to BERT. The loss of the sentences' order has no mean over tokens.
LEFT_OUT = ("calculate_per_token_loss", "mock_data", "sft", "fim_data", "mtp_num_layers")


def get_batch(data_iterator: Any) -> dict[str, torch.Tensor]:
    """The next micro-batch, read on the first tensor-parallel rank and broadcast to the others.

    Every pipeline stage needs one: the attention mask is made from the padding mask on each of them. Returns int64
    tensors, [micro batch, sequence] but for "is_random" (1: the two parts were swapped), which is [micro batch].
    """
    from megatron.core import tensor_parallel

    data = next(data_iterator) if data_iterator is not None else None
    return tensor_parallel.broadcast_data(BATCH_KEYS, data, torch.int64)


def loss_func(
    loss_mask: torch.Tensor, is_random: torch.Tensor, output: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The micro-batch's loss and what to log: mean over masked tokens + mean over samples of the order's cross-entropy.

    Args:
        loss_mask: 1 where a token was masked; [micro batch, sequence].
        is_random: 1 where the two parts were swapped; [micro batch].
        output: each token's cross-entropy, [micro batch, sequence], and the order's logits, [micro batch, 2], or None.

    Logged values are pairs (sum, count) of micro-batch means, which Megatron adds up over micro-batches and ranks.
    """
    token_losses, order_logits = output
    mask = loss_mask.float()
    lm_loss = torch.sum(token_losses.float() * mask) / mask.sum().clamp(min=1.0)
    losses = {"lm loss": lm_loss}
    if order_logits is not None:
        losses["sop loss"] = torch.nn.functional.cross_entropy(order_logits.float(), is_random)
        losses["loss"] = lm_loss + losses["sop loss"]
    loss = losses.get("loss", lm_loss)
    check_loss(loss)
    return loss, {name: torch.stack([value.detach(), torch.ones_like(value)]) for name, value in losses.items()}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """One micro-batch through the model; Megatron's schedule calls it, then the loss function that it returns."""
    from megatron.training import get_args, get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    output = model(
        batch["text"],
        batch["padding_mask"],
        tokentype_ids=batch["types"] if get_args().bert_binary_head else None,
        lm_labels=batch["labels"],
    )
    return output, partial(loss_func, batch["loss_mask"], batch["is_random"])


def model_provider(pre_process: bool = True, post_process: bool = True, **kwargs: Any) -> torch.nn.Module:
    """One pipeline stage of Megatron-Core's BERT."""
    from megatron.core.models.bert import bert_layer_specs
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    if args.transformer_impl == "local":
        spec = bert_layer_specs.bert_layer_local_spec
    else:
        spec = bert_layer_specs.get_bert_layer_with_transformer_engine_spec()
    return BertModel(
        config=kwargs.get("config") or core_transformer_config_from_args(args),
        num_tokentypes=2 if args.bert_binary_head else 0,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        add_binary_head=args.bert_binary_head,
        vp_stage=kwargs.get("vp_stage"),
        pg_collection=kwargs.get("pg_collection"),
    )


def datasets_provider(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets of ``num_samples`` samples each, from indexed files of sentences.

    Masks 15 % of the tokens (``--mask-prob``), whole words in runs of up to three; 80 % become [MASK], 10 % another
    token, 10 % stay (bert_dataset 184). Half of the samples have their two parts swapped.
    """
    from megatron.core import mpu
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDatasetConfig
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.training import get_args

    from megatron_lion.integration.loop.pretrain import bert_dataset

    args = get_args()
    config = BERTMaskedWordPieceDatasetConfig(
        **dataset_options(args),
        masking_probability=args.mask_prob,
        short_sequence_probability=args.short_seq_prob,
        masking_max_ngram=3,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        classification_head=args.bert_binary_head,
    )
    builder = BlendedMegatronDatasetBuilder(
        bert_dataset(), num_samples, lambda: mpu.get_tensor_model_parallel_rank() == 0, config
    )
    # With --eval-iters 0 a split has no samples. Megatron's sampler refuses that (data_samplers 142), but accepts None.
    train, valid, test = (dataset if dataset is not None and len(dataset) else None for dataset in builder.build())
    return train, valid, test


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own


def main() -> None:
    """Parse Megatron's command line and pretrain."""
    args = parse_command_line(
        "launch/pretrain_bert.py",
        left_out=LEFT_OUT,
        instead="it does not apply to BERT, remove it",
        tokenizer_type="BertWordPieceLowerCase",
    )
    if args.context_parallel_size > 1:
        raise LionError(f"--context-parallel-size {args.context_parallel_size} is not supported with BERT: use 1")
    from megatron_lion.integration.loop.pretrain import pretrain

    pretrain(args, datasets_provider, forward_step, model_provider)


if __name__ == "__main__":
    with readable_errors():
        main()
