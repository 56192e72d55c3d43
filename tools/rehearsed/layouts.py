"""Layouts of public models, and what a rank of each must hold: counted from the architecture, without Megatron.

The layouts are examples of how such a model is trained, not the settings of the original runs.
"""

from dataclasses import dataclass, replace

COMMON = (
    "--optimizer lion --lr 1e-4 --weight-decay 0.1 --bf16 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --micro-batch-size 1 --train-iters 10 --eval-iters 0 --eval-interval 1000 --mock-data "
    "--tokenizer-type NullTokenizer --save nowhere --save-interval 1000"
)
LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--disable-bias-linear --group-query-attention --num-query-groups 8"
)
MOMENTUM = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 1 / 16}
MASTERS = {"fp32": 4.0, "remainder": 2.0}
# Flags, and bytes of state for each parameter, by the precision of momentum and master weights.
STORAGES = {
    f"{momentum}, {masters}": (
        f"--lion-momentum-dtype {momentum} --lion-master-weights {masters}",
        MOMENTUM[momentum] + MASTERS[masters],
    )
    for masters in MASTERS
    for momentum in MOMENTUM
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model and how it is divided."""

    ranks: int
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    sequence: int
    batch: int
    flags: str = ""
    gated: bool = True
    groups: int | None = None
    latent: bool = False
    experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    tp: int = 1
    pp: int = 1
    ep: int = 1
    stage: int = 0
    """the pipeline stage; its first rank is rehearsed"""
    stage_layers: int = 0
    """layers of that stage; 0 for an even share"""

    @property
    def command_line(self) -> str:
        from launch.launcher.rehearsal import null_tokenizer_size

        parallel = f"--tensor-model-parallel-size {self.tp} --pipeline-model-parallel-size {self.pp}"
        if self.tp > 1:
            parallel += " --sequence-parallel"
        if self.experts:
            parallel += f" --num-experts {self.experts} --expert-model-parallel-size {self.ep}"
        return (
            f"{COMMON} --num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads} "
            f"--ffn-hidden-size {self.ffn} --vocab-size {null_tokenizer_size(self.vocabulary)} "
            f"--seq-length {self.sequence} --max-position-embeddings {self.sequence} "
            f"--global-batch-size {self.batch} {parallel} {self.flags}"
        )

    @property
    def rank(self) -> int:
        """The rehearsed rank. Megatron's pipeline stages are the outermost dimension of the ranks."""
        return self.stage * self.ranks // self.pp

    @property
    def parameters(self) -> tuple[int, int]:
        """Dense and expert parameters of the rehearsed rank, counted from the architecture."""
        h, tp = self.hidden, self.tp
        multiple = 128 * tp
        padded = -(-self.vocabulary // multiple) * multiple
        dense = 0
        if self.stage == 0:
            dense += padded * h // tp + (0 if self.groups or self.latent else self.sequence * h)
        if self.pp == 1:  # the last stage is here too
            dense += padded * h // tp + h
        expert = 0
        for layer in range(self.stage_layers or self.layers // self.pp):
            dense += self._attention + 2 * h * (1 if self.gated else 2)
            if self.experts and (self.stage > 0 or layer >= self.dense_layers):
                dense += h * self.experts + 3 * h * self.shared_ffn // tp
                expert += self.experts // self.ep * 3 * h * (self.expert_ffn or self.ffn)
            else:
                dense += (3 if self.gated else 2) * h * self.ffn // tp
                dense += 0 if self.gated else self.ffn // tp + h
        return dense, expert

    @property
    def _attention(self) -> int:
        h, tp, heads = self.hidden, self.tp, self.heads
        if self.latent:  # DeepSeek-V3's sizes
            query = h * 1536 + 1536 + 1536 * heads * 192 // tp
            return query + h * 576 + 512 + 512 * heads * 256 // tp + heads * 128 * h // tp
        channels = h // heads
        keys = 2 * (self.groups or heads) * channels
        biases = 0 if self.gated else (h + keys) // tp + h
        return h * (h + keys) // tp + h * h // tp + biases

    def expected(self, state_bytes: float) -> dict[str, float]:
        """Bytes of that rank with bf16 weights, fp32 gradients and ``state_bytes`` for each parameter."""
        dense, expert = self.parameters
        dp = self.ranks // (self.tp * self.pp)
        count = dense + expert
        # The expert-tensor-parallel size is the tensor-parallel one.
        state = dense / dp + (expert / (dp // self.ep) if expert else 0)
        return {"weights": 2.0 * count, "gradients": 4.0 * count, "state": state_bytes * state}


LAYOUTS = {
    "gpt3_175b": Layout(
        ranks=16384, layers=96, hidden=12288, heads=96, ffn=49152, vocabulary=50257, sequence=2048, batch=1536,
        tp=8, pp=16, gated=False,
    ),
    "llama3_8b": Layout(
        ranks=64, layers=32, hidden=4096, heads=32, ffn=14336, vocabulary=128256, sequence=8192, batch=512,
        groups=8, tp=2, flags=LLAMA,
    ),
    "llama3_70b": Layout(
        ranks=1024, layers=80, hidden=8192, heads=64, ffn=28672, vocabulary=128256, sequence=8192, batch=1024,
        groups=8, tp=8, pp=4, flags=LLAMA,
    ),
    "llama3_405b": Layout(
        ranks=16384, layers=126, hidden=16384, heads=128, ffn=53248, vocabulary=128256, sequence=8192, batch=2048,
        groups=8, tp=8, pp=16, stage_layers=7,
        flags=f"{LLAMA} --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    "mixtral_8x7b": Layout(
        ranks=256, layers=32, hidden=4096, heads=32, ffn=14336, vocabulary=32000, sequence=4096, batch=1024,
        groups=8, experts=8, pp=4, ep=8,
        flags=f"{LLAMA} --moe-router-topk 2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall",
    ),
    "deepseek_v3_like": Layout(
        ranks=2048, layers=61, hidden=7168, heads=128, ffn=18432, vocabulary=129280, sequence=4096, batch=1920 * 8,
        latent=True, experts=256, expert_ffn=2048, shared_ffn=2048, dense_layers=3, pp=16, ep=64,
        stage=1, stage_layers=4,
        flags="--swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
        "--disable-bias-linear --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 "
        "--qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --rotary-scaling-factor 40 "
        "--moe-layer-freq ([0]*3+[1]*58) --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048 "
        "--moe-router-topk 8 --moe-grouped-gemm --moe-token-dispatcher-type alltoall "
        "--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2",
    ),
}  # fmt: skip
# The same models on fewer or more ranks.
OTHER_RANKS = {
    "gpt3_175b": replace(LAYOUTS["gpt3_175b"], ranks=1024),
    "llama3_8b": replace(LAYOUTS["llama3_8b"], ranks=1024),
    "llama3_70b": replace(LAYOUTS["llama3_70b"], ranks=8192),
    "mixtral_8x7b": replace(LAYOUTS["mixtral_8x7b"], ranks=4096),
}
REFUSED = {
    "llama3_405b, without the flags that count embedding and loss as layers": replace(
        LAYOUTS["llama3_405b"], flags=LLAMA
    ),
    "llama3_70b on 16,384 ranks, a batch of 768": replace(LAYOUTS["llama3_70b"], ranks=16384, batch=768),
    "mixtral_8x7b, EP 16": replace(LAYOUTS["mixtral_8x7b"], ep=16),
    "gpt3_175b, TP 64": replace(LAYOUTS["gpt3_175b"], tp=64),
}
