"""Code that the pretraining scripts share: data sets from Megatron's flags, checks of the data and of each loss."""

import sys
from typing import Any

import torch

from megatron_lion.config import LionError


def dataset_options(args: Any) -> dict[str, Any]:
    """Settings of every kind of Megatron data set, from the command line."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": build_tokenizer(args),
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
    }


def check_loss(loss: torch.Tensor) -> None:
    """Let Megatron's rerun state machine stop the run at a loss that is NaN or infinite, unless its flag is off."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    if not get_args().check_for_nan_in_loss_and_grad:
        return
    for rejection, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=rejection,
            message=f"found {what} in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )


def parse_command_line(script: str, *, left_out: tuple[str, ...], instead: str, tokenizer_type: str) -> Any:
    """Register, then parse and validate Megatron's command line; ``tokenizer_type`` is the default one.

    Raises LionError if there is no device, for flags that ``script`` does not support (``instead`` says what to do),
    and for data that contradict their manifest.
    """
    import megatron_lion
    from megatron_lion.integration.cpu import torch_cuda

    if not {"-h", "--help"} & set(sys.argv):  # works on any machine
        torch_cuda.require_device()
    megatron_lion.register()
    from megatron_lion.integration.loop import vocabularies
    from megatron_lion.integration.loop.pretrain import parse_and_validate_args

    vocabularies.use_local_vocabularies()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": tokenizer_type})
    for name in left_out:
        if getattr(args, name, None):
            raise LionError(f"{script} does not support --{name.replace('_', '-')}: {instead}")
    vocabularies.check_data_manifests(args)
    return args
