"""Megatron's settings for a run without a GPU: flags for what a CPU lacks, and the environment. Imports nothing."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Each flag, and the argument that it sets: no NCCL, no fused kernels.
SETTINGS = {
    "--distributed-backend gloo": ("distributed_backend", "gloo"),
    "--transformer-impl local": ("transformer_impl", "local"),
    "--no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", False),
    "--no-rope-fusion": ("apply_rope_fusion", False),
    "--no-persist-layer-norm": ("no_persist_layer_norm", True),
    "--no-masked-softmax-fusion": ("masked_softmax_fusion", False),
}
FLAGS = " ".join(SETTINGS)
# Also on a machine with a GPU, which the CPU backend would otherwise refuse to hide.
ENVIRONMENT = {"MEGATRON_LION_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def apply(args: "Any") -> list[str]:
    """Set parsed arguments to ``SETTINGS``, in place. Returns the flags that the command line did not have."""
    changed = [flag for flag, (name, value) in SETTINGS.items() if getattr(args, name) != value]
    vars(args).update(SETTINGS.values())
    return changed
