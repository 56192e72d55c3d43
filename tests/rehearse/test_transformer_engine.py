"""The modules that replace Transformer Engine's have parameters of the same shapes, counts and bytes."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests import transformer_engine
from tests.harness import ROOT
from tests.rehearse.rehearsals import FLAGS, FOLDER, LION

pytestmark = pytest.mark.slow
LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--disable-bias-linear --group-query-attention --num-query-groups 2"
)
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2 "
    f"{LLAMA} --moe-ffn-hidden-size 96"
)
LATENT = (
    f"{LLAMA.split(' --group')[0]} --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 8 --qk-layernorm --rotary-scaling-factor 40"
)
TP_2 = "--tensor-model-parallel-size 2 --sequence-parallel"
CASES = {
    "LayerNorm, GELU and biases": "0 2",
    "the same at TP 2": f"1 2 {TP_2}",
    "RMSNorm, SwiGLU, grouped queries": f"0 2 {LLAMA}",
    "the same at TP 2, PP 2, last stage": f"3 4 {LLAMA} {TP_2} --pipeline-model-parallel-size 2",
    "normalized queries and keys": f"0 2 {LLAMA} --qk-layernorm",
    "multi-latent attention": f"0 2 {LATENT}",
    "the same at TP 2, whose ranks have the projections down whole": f"1 2 {LATENT} {TP_2}",
    "grouped experts at expert TP 2": f"1 4 {EXPERTS} {TP_2} --moe-grouped-gemm --expert-tensor-parallel-size 2",
    "context parallelism": f"0 4 {LLAMA} --context-parallel-size 2",
    "experts, one module each": f"0 2 {EXPERTS}",
    "grouped experts": f"0 2 {EXPERTS} --moe-grouped-gemm",
    "grouped experts beside a shared one": f"1 4 {EXPERTS} --moe-grouped-gemm --moe-shared-expert-intermediate-size 96",
    "fp8": f"0 2 {LLAMA} --fp8-format hybrid",
    "int8 momentum and remainders": f"0 2 {LLAMA} --lion-momentum-dtype int8 --lion-master-weights remainder",
}


# The modules with parameters that are replaced.
REPLACED = {
    "TELinear", "TEColumnParallelLinear", "TERowParallelLinear", "TELayerNormColumnParallelLinear",
    "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "LayerNorm", "RMSNorm",
}  # fmt: skip


def built(*arm: str) -> dict[str, dict[str, Any]]:
    """What ``te_ranks.py`` says of each case."""
    places = [case.split(maxsplit=2) for case in CASES.values()]
    lines = [f"{rank} {ranks} {FLAGS} {LION} {' '.join(flags)}" for rank, ranks, *flags in places]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "te_ranks.py"), *arm],
        input="\n".join(lines), capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("RANK ")]
    return dict(zip(CASES, found, strict=True))


def test_what_replaces_transformer_engine_has_the_same_parameters_and_bytes() -> None:
    """Also the padding of the buckets and the messages of a step, and what this package reads of parameters: their
    kind, their layer, and on which ranks they count."""
    theirs, ours = built("te", str(transformer_engine.folder())), built("local")
    replaced: set[str] = set()
    for case in CASES:
        one, other = theirs[case], ours[case]
        assert len(one["parameters"]) > 5, case
        for what in ("parameters", "read", "sizes", "padding", "traffic"):
            assert one[what] == other[what], (case, what)
        replaced |= set(one["modules"]) - set(other["modules"])
        assert not any("TE" in name or "transformer_engine" in name for name in other["modules"]), case
    assert {name.split(".")[1] for name in replaced} == REPLACED
