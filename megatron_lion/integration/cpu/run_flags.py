"""How a run without a GPU is started: Megatron's flags for what a CPU lacks, and the environment. Imports nothing."""

# Fused kernels and NCCL.
FLAGS = (
    "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion --no-rope-fusion "
    "--no-persist-layer-norm --no-masked-softmax-fusion"
)
# Also on a machine with a GPU, which the CPU backend would otherwise refuse to hide.
ENVIRONMENT = {"MEGATRON_LION_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
