"""Every parameter is on Lion, with the betas asked for, in state sharded over DP; stock Megatron fails these checks."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.harness import BATCH, CPU, MODEL, RATE, run_ranks, text_flags
from tests.versions import since

PROBE = Path(__file__).with_name("probe.py")
# The probe makes gradients by hand, outside the schedule that the NaN check belongs to.
PROBE_FLAGS = "--train-iters 4 --no-check-for-nan-in-loss-and-grad"
DISTRIBUTED = "--use-distributed-optimizer"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --disable-bias-linear"


def probe(text: Path, what: str, *flags: str, ranks: int, **environment: str) -> list[dict[str, Any]]:
    """The probe's answer on each rank."""
    lines = (what, MODEL, BATCH, RATE, CPU, text_flags(text), PROBE_FLAGS, *flags)
    with tempfile.TemporaryDirectory() as folder:
        run = run_ranks(*lines, ranks=ranks, script=PROBE, environment={"PROBE_OUTPUT": folder, **environment})
        assert run.returncode == 0, run.output[-6000:]
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def off_lion(answers: list[dict[str, Any]], betas: list[float]) -> list[str]:
    """The parameters, over all ranks, that are not on Lion with ``betas``."""
    return sorted(
        name
        for answer in answers
        for name, owner in answer["owners"].items()
        if owner["optimizer"] != "ShardedLion" or owner["betas"] != betas
    )


@pytest.mark.supports(
    "every parameter on Lion, `--lion-beta1/2` used, weight decay by group",
    "listed for each parameter; the same check fails on stock Megatron",
)
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ""),
        (2, f"{DISTRIBUTED} --bf16"),
        (2, "--bf16"),
        (4, f"{DISTRIBUTED} --tensor-model-parallel-size 2 --sequence-parallel --bf16"),
        (2, f"{DISTRIBUTED} --pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights"),
    ],
)
@pytest.mark.supports("Megatron's loop / options", "on gloo ranks")
def test_every_parameter_is_on_lion_with_the_betas_asked_for(text: Path, ranks: int, flags: str) -> None:
    answers = probe(text, "parameters", "--optimizer lion --lion-beta1 0.8 --lion-beta2 0.97", flags, ranks=ranks)
    assert off_lion(answers, [0.8, 0.97]) == []
    owned = {name for answer in answers for name in answer["owners"]}
    # With pipeline stages the same name is another layer on another rank, so ranks are added up instead.
    expected = 29 if "pipeline" in flags else 28
    assert (sum(len(a["owners"]) for a in answers) if "pipeline" in flags else len(owned)) == expected
    # The usual groups: weight decay on matrices, none on biases and norms.
    decays = {owner["weight_decay"] for answer in answers for owner in answer["owners"].values()}
    assert decays == {0.0, 0.1}


@since("0.18")
def test_the_check_above_fails_on_stock_megatron(text: Path) -> None:
    pytest.importorskip("emerging_optimizers", reason="stock Megatron's Lion needs emerging-optimizers")
    flags = "--optimizer lion --lion-beta1 0.8 --lion-beta2 0.97"
    answers = probe(text, "stock-parameters", flags, ranks=1)
    off = off_lion(answers, [0.8, 0.97])
    assert any("word_embeddings" in name for name in off), "stock sends embeddings to Adam"
    assert any("layernorm" in name for name in off), "stock sends 1-D parameters to Adam"
    stock_lion = [owner for owner in answers[0]["owners"].values() if owner["optimizer"] == "Lion"]
    assert stock_lion
    assert all(owner["betas"] != [0.8, 0.97] for owner in stock_lion), "stock ignores --lion-beta1 and --lion-beta2"


@pytest.mark.supports(
    "the sharded step equals the unsharded one",
    "bit for bit, DP 2 and 4, bf16 and fp32, shards that cut parameters",
)
@pytest.mark.parametrize("flags", ["--bf16", "", "--bf16 --overlap-grad-reduce --overlap-param-gather"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sharded_step_inside_megatron_equals_plain_lion_bit_for_bit(text: Path, ranks: int, flags: str) -> None:
    # Small buckets, so that shards begin and end inside parameters. No clipping: its factor is another test's matter.
    flags = f"--optimizer lion {DISTRIBUTED} --clip-grad 0 --ddp-bucket-size 20000 {flags}"
    for answer in probe(text, "sharded-step", flags, ranks=ranks):
        assert answer["parameters"] == 28
        assert answer["different"] == []


# In which parameter the last rank alone finds a NaN, then an infinity, and the run's flags.
NON_FINITE = {
    "bf16, sharded": ("", DISTRIBUTED + " --bf16"),
    "bf16, not sharded": ("", "--bf16"),
    "fp32, sharded, not clipped": ("", f"{DISTRIBUTED} --clip-grad 0"),
    "fp32, not sharded": ("", ""),
    "fp16, sharded": ("", f"{DISTRIBUTED} --fp16 --initial-loss-scale 1024 --hysteresis 1"),
    # What the gradient norm does not see.
    "TP 2, in one rank's copy": ("layernorm", f"{DISTRIBUTED} --tensor-model-parallel-size 2"),
    "TP 2, in one rank's copy, int8 momentum": (
        "layernorm",
        f"{DISTRIBUTED} --tensor-model-parallel-size 2 --bf16 --lion-momentum-dtype int8",
    ),
    "PP 2, in the tied copy": ("output_layer", f"{DISTRIBUTED} --pipeline-model-parallel-size 2"),
    "in one rank's expert": ("experts", f"{DISTRIBUTED} {MOE} --expert-model-parallel-size 2"),
}
SLOW = ("bf16, not sharded", "fp32, sharded, not clipped", "fp16, sharded", "TP 2, in one rank's copy")


@pytest.mark.supports(
    "a NaN or Inf gradient on one rank",
    "every rank skips the update; weights, masters and momentum stay bit-identical",
)
@pytest.mark.parametrize(
    ("where", "flags"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in NON_FINITE.items()],
)
def test_a_non_finite_gradient_on_one_rank_changes_nothing_on_any(text: Path, where: str, flags: str) -> None:
    for answer in probe(text, "non-finite", "--optimizer lion", flags, ranks=2, PROBE_BAD=where):
        assert answer["applied"] == [True, False, False, True]
        assert answer["changed"] == [True, False, False, True]
        assert answer["scale"] == ([1024.0, 512.0, 256.0, 256.0] if "--fp16" in flags else [1.0] * 4)


@pytest.mark.supports("optimizer state sharded over DP", "counted in bytes on the fullest rank, DP 1, 2, 4")
def test_optimizer_state_halves_as_data_parallel_doubles(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        "",
        "optimizer state beside bf16 weights, bytes on the fullest rank",
        "| DP | Lion | Adam | Lion / Adam |",
        "|---|---|---|---|",
    ]
    sizes: dict[str, list[int]] = {"lion": [], "adam": []}
    for ranks in (1, 2, 4):
        for name, measured in sizes.items():
            answers = probe(text, "parameters", f"--optimizer {name} {DISTRIBUTED} --bf16", ranks=ranks)
            measured.append(max(answer["state_bytes"] for answer in answers))
        lion, adam = sizes["lion"][-1], sizes["adam"][-1]
        rows.append(f"| {ranks} | {lion:,} | {adam:,} | {lion / adam:.3f} |")
    with capsys.disabled():
        print("\n".join(rows))
    for one, two in zip(sizes["lion"], sizes["lion"][1:], strict=False):
        assert two / one == pytest.approx(0.5, rel=0.02)  # buckets are padded to whole shards
    # fp32 master and one moment against fp32 master and two; torch's Adam adds a 4-byte step for each tensor.
    for lion, adam in zip(sizes["lion"], sizes["adam"], strict=True):
        assert lion / adam == pytest.approx(2 / 3, rel=0.001)
