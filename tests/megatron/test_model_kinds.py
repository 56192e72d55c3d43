"""Every kind of model trains with Lion as one process trains it, or is refused by name."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_lion.integration.checkpoint.formats import EXPERTS_APART
from tests.harness import (
    BATCH,
    CPU,
    HORIZON,
    MODEL,
    NO_DROPOUT,
    PRETRAIN_GPT,
    RATE,
    Run,
    assert_same_checkpoint,
    read_checkpoint,
    relative_difference,
    run_ranks,
    text_flags,
)
from tests.versions import since, until

KINDS = Path(__file__).with_name("kinds.py")
DISTRIBUTED = "--use-distributed-optimizer"
CANONICAL = "--dist-ckpt-optim-fully-reshardable"
WEIGHTS_ALONE = "--no-load-optim"
START = 2
RUN = f"--optimizer lion --num-layers 4 --micro-batch-size 1 {HORIZON} {NO_DROPOUT} --make-vocab-size-divisible-by 256"
UNTIED = "--untie-embeddings-and-output-weights"
# Local layers have experts without biases only. No auxiliary loss, which each layout would take over other tokens.
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--moe-token-dispatcher-type allgather --disable-bias-linear"
)
HYBRID = "--hybrid-layer-pattern *-*- --is-hybrid-model --position-embedding-type rope"
MAMBA = (
    "--hybrid-layer-pattern M*M- --is-hybrid-model --position-embedding-type rope --mamba-num-heads 4 "
    "--mamba-head-dim 32 --mamba-num-groups 2 --mamba-state-dim 16"
)
MULTI_TOKEN = "--mtp-num-layers 1 --position-embedding-type rope"
TENSOR_PARALLEL = f"{DISTRIBUTED} --tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = f"{DISTRIBUTED} --pipeline-model-parallel-size 2"

# As in test_layouts.py; fp16's activations have 11 bits where bf16's have 8.
FP32_TOLERANCE = 5e-6
FP16_TOLERANCE = 2e-5


class Kind(NamedTuple):
    """A model, a layout of it, and whether the tests of continuous integration have it."""

    script: str | None
    model: str
    ranks: int
    layout: str
    slow: bool = False


CASES = {
    "experts, EP 2": Kind(None, MOE, 2, f"{DISTRIBUTED} --expert-model-parallel-size 2"),
    "experts, EP 2, not sharded": Kind(None, MOE, 2, "--expert-model-parallel-size 2", slow=True),
    "experts, TP 2 x EP 2, expert TP 1": Kind(
        None, MOE, 2, f"{TENSOR_PARALLEL} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1", slow=True
    ),
    "experts, TP 2 x EP 2 x DP 2, expert TP 2": Kind(
        None, MOE, 4, f"{TENSOR_PARALLEL} --expert-model-parallel-size 2 --expert-tensor-parallel-size 2", slow=True
    ),
    "experts, interleaved PP 2": Kind(None, MOE, 2, f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1", slow=True),
    "context parallel 2": Kind("context-parallel", "", 2, f"{DISTRIBUTED} --context-parallel-size 2"),
    "context parallel 2 x DP 2, not sharded": Kind("context-parallel", "", 4, "--context-parallel-size 2", slow=True),
    "frozen parameters, DP 2": Kind("frozen", UNTIED, 2, DISTRIBUTED, slow=True),
    "frozen parameters, PP 2": Kind("frozen", UNTIED, 2, PIPELINE, slow=True),
    "fp16, DP 2": Kind(None, "--fp16 --initial-loss-scale 65536", 2, DISTRIBUTED),
    "fp16, DP 2, not sharded": Kind(None, "--fp16 --initial-loss-scale 65536", 2, "", slow=True),
    "fp16, TP 2": Kind(None, "--fp16 --initial-loss-scale 65536", 2, TENSOR_PARALLEL, slow=True),
    "per-token loss, DP 4 in two optimizer instances": Kind(
        None, "--calculate-per-token-loss", 4, f"{DISTRIBUTED} --num-distributed-optimizer-instances 2"
    ),
    "two optimizer instances, overlap": Kind(
        None,
        "",
        4,
        f"{DISTRIBUTED} --num-distributed-optimizer-instances 2 --overlap-grad-reduce --overlap-param-gather",
        slow=True,
    ),
    "decoupled learning rate, tied, PP 2": Kind(
        None, "--decoupled-lr 3e-4 --decoupled-min-lr 3e-5", 2, PIPELINE, slow=True
    ),
    "decoupled learning rate, untied, DP 2": Kind(
        None, f"--decoupled-lr 3e-4 --decoupled-min-lr 3e-5 {UNTIED}", 2, DISTRIBUTED, slow=True
    ),
    "HybridModel of attention and MLP layers, DP 2": Kind("hybrid", HYBRID, 2, DISTRIBUTED, slow=True),
    "HybridModel of attention and MLP layers, TP 2": Kind("hybrid", HYBRID, 2, TENSOR_PARALLEL, slow=True),
    "Mamba layers, DP 2": Kind("mamba", MAMBA, 2, DISTRIBUTED, slow=True),
    "Mamba layers, TP 2": Kind("mamba", MAMBA, 2, TENSOR_PARALLEL, slow=True),
    "multi-token prediction, DP 2": Kind("multi-token", MULTI_TOKEN, 2, DISTRIBUTED, slow=True),
    "multi-token prediction, TP 2": Kind("multi-token", MULTI_TOKEN, 2, TENSOR_PARALLEL, slow=True),
}

HOW = "loss curve of one process from one checkpoint, 6 steps"
# Older loops make these in other ways, and 0.20 in development cannot make the second one of local layers.
ONLY = {"HybridModel": [since("0.19")], "Mamba": [since("0.19")], "multi-token": [since("0.19"), until("0.19")]}
# By the first word of a case.
ROWS = {
    "experts,": pytest.mark.supports("mixture of experts: EP, with TP and expert TP, interleaved PP", HOW),
    "context": pytest.mark.supports(
        "context parallel", f"{HOW}, with an attention of the tests that gathers keys: Megatron's own needs a GPU"
    ),
    "frozen": pytest.mark.supports(
        "frozen parameters", f"{HOW}; resumed bit for bit; frozen weights stay bit-identical"
    ),
    "fp16,": pytest.mark.supports("fp16 with the dynamic loss scale", f"{HOW}; an overflow halves it, all else stays"),
    "per-token": pytest.mark.supports("`--calculate-per-token-loss`", HOW),
    "two": pytest.mark.supports("several distributed-optimizer instances", HOW),
    "decoupled": pytest.mark.supports("`--decoupled-lr`, tied and untied", f"{HOW}; each weight moves by its own rate"),
    "HybridModel": pytest.mark.supports("HybridModel of attention and MLP layers", f"{HOW}; resumed bit for bit"),
    "Mamba": pytest.mark.supports(
        "HybridModel with Mamba layers", f"{HOW}, the scan in plain torch; resumed bit for bit; decay by parameter"
    ),
    "multi-token": pytest.mark.supports("multi-token prediction", f"{HOW}; resumed bit for bit"),
}


def marks_of(name: str, kind: Kind) -> list[pytest.MarkDecorator]:
    """The marks of one of ``CASES``."""
    first = name.split()[0]
    return [ROWS[first], *[pytest.mark.slow] * kind.slow, *ONLY.get(first, [])]


def train(text: Path, script: str | None, *flags: str, **kwargs: Any) -> Run:
    """A run of the tiny model, by ``kinds.py`` where ``script`` names one of its kinds."""
    first = [script] if script else []
    path = KINDS if script else PRETRAIN_GPT
    return run_ranks(*first, MODEL, BATCH, RATE, CPU, text_flags(text), RUN, *flags, script=path, **kwargs)


def finished(run: Run) -> Run:
    """``run``, which must have ended well."""
    assert run.returncode == 0, run.output[-6000:]
    return run


@pytest.fixture(scope="module")
def one_process(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By script and model: a checkpoint after two steps, and one process's run from it, with or without momentum."""
    kept: dict[Any, Any] = {}

    def start(script: str | None, model: str, optimizer_state: str) -> tuple[Path, Run]:
        if (script, model) not in kept:
            folder = tmp_path_factory.mktemp("one_process")
            save = f"--save {folder} --save-interval {START} --exit-interval {START}"
            finished(train(text, script, model, DISTRIBUTED, CANONICAL, "--train-iters 8", save))
            kept[script, model] = folder
        folder, key = kept[script, model], (script, model, optimizer_state)
        if key not in kept:
            load = f"--load {folder} {optimizer_state} --no-load-rng --train-iters 8"
            kept[key] = finished(train(text, script, model, DISTRIBUTED, load))
        return folder, kept[key]

    return start


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=name, marks=marks_of(name, kind)) for name, kind in CASES.items()],
)
def test_a_kind_of_model_trains_as_in_one_process(
    text: Path, one_process: Any, kind: Kind, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # Megatron has one optimizer for experts that are not parallel, and other keys for state that is not sharded.
    optimizer_state = WEIGHTS_ALONE if "--expert-model" in kind.layout or DISTRIBUTED not in kind.layout else ""
    folder, reference = one_process(kind.script, kind.model, optimizer_state)
    load = f"--load {folder} {optimizer_state} --no-load-rng --train-iters 8"
    run = finished(train(text, kind.script, kind.model, kind.layout, load, ranks=kind.ranks))
    assert sorted(run.log.loss) == list(range(START + 1, 9))
    difference = relative_difference(reference.log, run.log)
    with capsys.disabled():
        print(f"\n{request.node.callspec.id}: differs from one process by {difference:.1e} in losses")
    assert difference < (FP16_TOLERANCE if "--fp16" in kind.model else FP32_TOLERANCE)
    # Every parameter is on Lion, the same number of them in every layout.
    (one,), (many,) = ([line.split(", betas")[0] for line in of.ours()][:1] for of in (reference, run))
    assert one == many
    on_lion, trainable = one.split("lion on ")[1].split(" parameters")[0].split(" of ")
    assert on_lion == trainable


# ---- each parameter group by its own learning rate and weight decay, from two checkpoints and the rule alone ----


def moved_by(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], rate: dict[str, float]) -> None:
    """From ``one`` to ``two`` each weight went by its rate times a sign and its decay: -1, 0 or 1 is left over."""
    weights = [key for key in one if not key.startswith("optimizer") and one[key].is_floating_point()]
    assert len(weights) > 10
    for key in weights:
        lr = next(value for part, value in rate.items() if part in key)
        before, after = one[key].double(), two[key].double()
        if lr == 0.0:
            assert torch.equal(before, after), f"{key} is frozen"
            continue
        decay = 0.0 if re.search(r"bias|norm|A_log|mixer\.D$", key) else 0.1
        signs = (before - after) / lr - decay * before
        assert (signs - signs.round()).abs().max() < 0.03, f"{key} did not go by {lr}"
        assert signs.round().abs().max() == 1, key


@pytest.mark.supports(
    "learning rate and weight decay by parameter group", "every weight checked against the update rule"
)
@pytest.mark.parametrize(
    ("script", "flags", "rate"),
    [
        (
            "learning-rates",
            f"--decoupled-lr 3e-4 --decoupled-min-lr 3e-4 {UNTIED}",
            {"word_embeddings": 3e-4, "output_layer": 3e-4, "norm": 1e-5, "": 1e-4},
        ),
        pytest.param("mamba", MAMBA, {"": 1e-4}, marks=[pytest.mark.slow, *ONLY["Mamba"]]),
        ("frozen", "", {"word_embeddings": 0.0, "fc1.weight": 0.0, "fc1.bias": 0.0, "proj.bias": 0.0, "": 1e-4}),
    ],
)
def test_each_parameter_moves_by_its_own_learning_rate_and_weight_decay(
    text: Path, tmp_path: Path, script: str, flags: str, rate: dict[str, float]
) -> None:
    run = f"{DISTRIBUTED} --lr-decay-style constant --min-lr 1e-4 --train-iters 2 --save {tmp_path} --save-interval 1"
    finished(train(text, script, flags, run, ranks=2))
    moved_by(read_checkpoint(tmp_path, 1), read_checkpoint(tmp_path, 2), rate)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("frozen", DISTRIBUTED),
        pytest.param("frozen-layer", DISTRIBUTED, marks=pytest.mark.slow),
        pytest.param(None, f"{MOE} {DISTRIBUTED} --expert-model-parallel-size 2 {CANONICAL}", marks=pytest.mark.slow),
        pytest.param("hybrid", f"{HYBRID} {DISTRIBUTED} {CANONICAL}", marks=[pytest.mark.slow, *ONLY["HybridModel"]]),
        pytest.param("mamba", f"{MAMBA} {DISTRIBUTED} {CANONICAL}", marks=[pytest.mark.slow, *ONLY["Mamba"]]),
        pytest.param(
            "multi-token", f"{MULTI_TOKEN} {DISTRIBUTED} {CANONICAL}", marks=[pytest.mark.slow, *ONLY["multi-token"]]
        ),
        pytest.param(
            "learning-rates",
            f"--decoupled-lr 3e-4 --decoupled-min-lr 3e-5 {DISTRIBUTED} {CANONICAL}",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_kind_of_model_resumed_equals_the_uninterrupted_one(
    text: Path, tmp_path: Path, script: str | None, flags: str
) -> None:
    run = f"{flags} --train-iters 4 --save {tmp_path} --save-interval 2"
    whole = finished(train(text, script, run, ranks=2))
    expected = read_checkpoint(tmp_path, 4)
    resumed = finished(train(text, script, run, f"--load {tmp_path} --ckpt-step 2", ranks=2))
    assert whole.log.loss[3] == resumed.log.loss[3]
    assert_same_checkpoint(expected, read_checkpoint(tmp_path, 4))


# ---- fp16: the loss scale ----


def test_an_overflow_halves_the_loss_scale_and_changes_no_weight(text: Path, tmp_path: Path) -> None:
    scale = "--fp16 --initial-loss-scale 4294967296 --hysteresis 1 --min-loss-scale 1"
    flags = f"{DISTRIBUTED} {scale} --train-iters 3 --save {tmp_path} --save-interval 1"
    run = finished(train(text, None, flags, ranks=2))
    assert "number of skipped iterations:   0" not in run.output
    scales = [float(part.split("|")[0]) for part in run.output.split("loss scale: ")[1:]]
    assert scales == [2.0**31, 2.0**30, 2.0**29]
    assert_same_checkpoint(read_checkpoint(tmp_path, 1), read_checkpoint(tmp_path, 3))


# ---- refused by name ----


def test_experts_saved_whole_are_not_loaded_in_parts_but_their_weights_are(text: Path, one_process: Any) -> None:
    folder, _ = one_process(None, MOE, WEIGHTS_ALONE)
    flags = f"{MOE} {DISTRIBUTED} --expert-model-parallel-size 2 --load {folder} --train-iters 8"
    run = train(text, None, flags, ranks=2)
    assert run.returncode not in (0, -9), run.output[-3000:]
    assert not run.log.loss
    assert "the --expert-model-parallel-size that it was saved with" in run.output
    assert "--no-load-optim" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", CANONICAL])
def test_experts_saved_in_parts_go_to_another_number_of_parts_but_not_into_one(
    text: Path, tmp_path: Path, how: str
) -> None:
    model = f"{MOE} {DISTRIBUTED} {how} --train-iters 6"
    two = f"--expert-model-parallel-size 2 --save {tmp_path} --save-interval {START}"
    saved = finished(train(text, None, model, two, ranks=2))
    load = f"--load {tmp_path} --ckpt-step {START} --no-load-rng"
    whole = train(text, None, model, load, ranks=2)
    assert whole.returncode not in (0, -9), whole.output[-3000:]
    assert EXPERTS_APART in whole.output
    four = train(text, None, model, load, "--expert-model-parallel-size 4", ranks=4)
    if how:
        assert relative_difference(saved.log, finished(four).log) <= FP32_TOLERANCE
    else:
        assert four.returncode not in (0, -9), four.output[-3000:]
        assert f"EP 2 to 4: the optimizer state in {tmp_path} is in Megatron's default format" in four.output


@pytest.mark.parametrize("flags", ["", f"{DISTRIBUTED} {CANONICAL}"])
def test_a_frozen_layer_beside_trained_ones_is_refused_where_its_state_could_not_be_saved(
    text: Path, tmp_path: Path, flags: str
) -> None:
    run = train(text, "frozen-layer", flags, f"--train-iters 2 --save {tmp_path} --save-interval 1", ranks=2)
    assert run.returncode not in (0, -9)
    assert "trained in some layers and frozen in others" in run.output
    assert "use --use-distributed-optimizer without --dist-ckpt-optim-fully-reshardable" in run.output
    assert not run.log.loss


def test_context_parallel_without_transformer_engine_is_refused_by_megatron_before_a_step(text: Path) -> None:
    run = train(text, None, f"{DISTRIBUTED} --context-parallel-size 2 --train-iters 2", ranks=2)
    assert run.returncode not in (0, -9)
    assert "Context parallelism is only supported by TEDotProductAttention!" in run.output
    assert not run.log.loss


def test_this_launch_script_leaves_multi_token_prediction_to_megatrons_own(text: Path) -> None:
    run = train(text, None, f"{MULTI_TOKEN} --train-iters 2")
    assert run.returncode not in (0, -9)
    assert "does not support --mtp-num-layers: use Megatron-LM's own script" in run.output
