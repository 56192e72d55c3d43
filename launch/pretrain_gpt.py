"""Pretrain a GPT with Megatron's own loop; needs nothing but the megatron-core wheel and this package.

    torchrun --nproc-per-node 8 launch/pretrain_gpt.py --optimizer lion --lr 1e-4 <Megatron's own flags>

Every flag is Megatron's (--help lists them). Sequence packing, SFT, fill-in-the-middle and multi-token prediction are
for Megatron-LM's own pretrain_gpt.py: run that one with ``torchrun -m megatron_lion.run pretrain_gpt.py``.
"""

from functools import partial
from typing import Any

import torch

from megatron_lion.integration.loop.script_support import check_loss, dataset_options, parse_command_line
from megatron_lion.run import readable_errors

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

# Flags that need parts of Megatron-LM's script that this one does not have.
LEFT_OUT = ("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking", "mtp_num_layers")


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """The next micro-batch: read on the first tensor-parallel rank, broadcast to the others, cut for context parallel.

    Returns one entry for each of ``BATCH_KEYS``, of shape [micro batch, sequence length] or None; all None on a
    pipeline stage that needs no tokens.
    """
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    from megatron_lion.integration.loop.pretrain import batch_on_this_rank

    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    return batch_on_this_rank(data_iterator, get_args(), BATCH_KEYS)


def loss_func(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the tokens' losses, the number of tokens, and both for the log.

    Args:
        loss_mask: 1 for tokens that count, 0 for padding; [micro batch, sequence].
        losses: each token's cross-entropy, the same shape.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch through the model; Megatron's schedule calls it, then the loss function that it returns."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets of ``num_samples`` sequences each, from Megatron's indexed files."""
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    config = GPTDatasetConfig(
        **dataset_options(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def reads_data() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, reads_data, config).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own


def main() -> None:
    """Parse Megatron's command line and pretrain."""
    args = parse_command_line(
        "launch/pretrain_gpt.py",
        left_out=LEFT_OUT,
        instead="use Megatron-LM's own script, torchrun -m megatron_lion.run /path/to/Megatron-LM/pretrain_gpt.py",
        tokenizer_type="GPT2BPETokenizer",
    )
    from megatron_lion.integration.loop.pretrain import pretrain

    pretrain(args, datasets_provider, forward_step)


if __name__ == "__main__":
    with readable_errors():
        main()
