"""Rehearse layouts of public runs and the project's recipes, and write docs/results/rehearse.md.

    python tools/rehearse_layouts.py --output docs/results/rehearse.md                 all of them
    python tools/rehearse_layouts.py --only llama3_8b --output /tmp/page.md            one

The layouts are examples of how such a model is trained, not the settings of the original runs. The expected numbers
are counted by the formulas below, from the architecture, without Megatron.
"""

import argparse
import datetime
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_lion.config import LionError  # noqa: E402
from megatron_lion.integration.cpu import run_flags  # noqa: E402

os.environ.update(run_flags.ENVIRONMENT)  # before torch is imported

GIB = 1 << 30
COMMON = (
    "--optimizer lion --lr 1e-4 --weight-decay 0.1 --bf16 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --micro-batch-size 1 --train-iters 10 --eval-iters 0 --eval-interval 1000 --mock-data "
    "--tokenizer-type NullTokenizer --save nowhere --save-interval 1000"
)
LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--disable-bias-linear --group-query-attention --num-query-groups 8"
)
STORAGES = {
    "fp32, fp32": ("", 8.0),
    "bf16, remainder": ("--lion-momentum-dtype bf16 --lion-master-weights remainder", 4.0),
    "int8, remainder": ("--lion-momentum-dtype int8 --lion-master-weights remainder", 3.0 + 1 / 16),
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
    """the pipeline stage of which the first rank is rehearsed"""
    stage_layers: int = 0
    """layers of that stage; 0 for an even share"""

    @property
    def command_line(self) -> str:
        parallel = f"--tensor-model-parallel-size {self.tp} --pipeline-model-parallel-size {self.pp}"
        if self.tp > 1:
            parallel += " --sequence-parallel"
        if self.experts:
            parallel += f" --num-experts {self.experts} --expert-model-parallel-size {self.ep}"
        return (
            f"{COMMON} --num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads} "
            f"--ffn-hidden-size {self.ffn} --vocab-size {self.vocabulary} --seq-length {self.sequence} "
            f"--max-position-embeddings {self.sequence} --global-batch-size {self.batch} {parallel} {self.flags}"
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
RECIPES = ("gpt2_small", "gpt2_medium", "bert_small", "bert_base")


def rehearse(script: Path, flags: list[str], ranks: int, chosen: list[int] | None) -> tuple[list[Any], float]:
    """The reports of ``chosen`` ranks, or of the distinct ones, and the seconds that they took."""
    from megatron_lion.cli.rehearse import ranks as processes

    began = time.monotonic()
    options = SimpleNamespace(script=str(script), flags=flags, world_size=ranks, rank=chosen, steps=0)
    return processes.rehearse(options), time.monotonic() - began


def public_rows(name: str, layout: Layout) -> list[str]:
    """A row for each storage."""
    from megatron_lion.cli.rehearse.ranks import WouldNotStart

    rows = []
    for storage, (flags, state_bytes) in STORAGES.items():
        words = f"{layout.command_line} {flags}".split()
        sizes = f"TP {layout.tp}, PP {layout.pp}" + (f", EP {layout.ep}" if layout.ep > 1 else "")
        head = f"| {name} | {layout.rank:,} of {layout.ranks:,} | {sizes} | {storage} |"
        try:
            (report,), seconds = rehearse(ROOT / "launch" / "pretrain_gpt.py", words, layout.ranks, [layout.rank])
        except (LionError, WouldNotStart) as error:
            rows.append(f"{head} refused: {str(error).splitlines()[-2 if chr(10) in str(error) else -1]} |" + " |" * 6)
            continue
        built = {
            "weights": report.sizes["weights"],
            "gradients": report.sizes["gradients"],
            "state": report.sizes["momentum"] + report.sizes["masters"],
        }
        expected = layout.expected(state_bytes)
        cells = [f"{built[kind] / GIB:.2f} ({100 * (built[kind] / expected[kind] - 1):+.2f} %)" for kind in built]
        rows.append(
            f"{head} {report.sizes['parameters']:,} | {' | '.join(cells)} | {report.sizes['on_device'] / GIB:.2f} | "
            f"{seconds:.0f} s | {report.host_bytes / GIB:.1f} |"
        )
    return rows


def recipe_rows(name: str) -> list[str]:
    """A row of a recipe with Lion on a100x16, with the recipe's estimate."""
    from launch.launcher import estimates, recipes, rehearsal

    rates = ["lr=1e-5", "min-lr=0", "weight-decay=0.1"]  # which the recipes for BERT do not have
    recipe = recipes.resolve(name, "lion", "a100x16", rates)
    words = rehearsal.flags(recipe, [])
    reports, seconds = rehearse(ROOT / "launch" / recipe["script"], words, recipe.ranks, None)
    fullest = max(reports, key=lambda report: int(report.sizes["on_device"])).sizes
    needed = estimates.memory(recipe)
    pairs = (
        (fullest["weights"], needed.weights),
        (fullest["gradients"], needed.gradients),
        (fullest["momentum"] + fullest["masters"], needed.state),
    )
    cells = " | ".join(f"{built / 2**20:.1f} ({100 * (built / expected - 1):+.2f} %)" for built, expected in pairs)
    return [f"| {name} | {fullest['parameters']:,} | {cells} | {len(reports)} | {seconds:.0f} s |"]


PAGE = """# Rehearsed layouts

`megatron-lion rehearse` ([manual](../rehearse.md)) on one CPU, {date}, megatron-core {megatron}. No GPU was used, and
nothing was trained. Written by

```bash
python tools/rehearse_layouts.py --output docs/results/rehearse.md
```

## The project's recipes on a100x16

Fullest of the rehearsed ranks, in MiB; in parentheses the difference from the recipe's estimate.

| recipe | parameters | weights | gradients | state | ranks rehearsed | time |
|---|---|---|---|---|---|---|
{recipes}

## Layouts of public models

One rank, in GiB; in parentheses the difference from what the architecture says (formulas in the tool). State is
momentum and master weights. The layouts are examples, not the settings of the original runs. Time and peak memory are
those of the process on a machine with other work.

| model | rank | layout | momentum, masters | parameters | weights | gradients | state | total | time | host memory |
|---|---|---|---|---|---|---|---|---|---|---|
{layouts}
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=(*LAYOUTS, *RECIPES), help="some of them; default: all")
    options = parser.parse_args()
    from megatron_lion.integration.compat.versions import megatron_version

    wanted = options.only or (*RECIPES, *LAYOUTS)
    page = PAGE.format(
        date=datetime.date.today(),
        megatron=megatron_version(),
        recipes="\n".join(row for name in RECIPES if name in wanted for row in recipe_rows(name)),
        layouts="\n".join(
            row for name, layout in LAYOUTS.items() if name in wanted for row in public_rows(name, layout)
        ),
    )
    options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
