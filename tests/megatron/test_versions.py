"""Every supported release of megatron-core: Lion everywhere, exact steps, one curve, resume bit for bit, norm ratios.

With MEGATRON_LION_VERSIONS_PAGE=docs/results/versions.md the table on that page is written from what these tests find.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.config import LionError
from megatron_lion.integration.compat import versions as compat_versions
from tests.harness import (
    HORIZON,
    NO_DROPOUT,
    PRETRAIN_GPT,
    ROOT,
    Run,
    assert_same_checkpoint,
    pretrain_flags,
    read_checkpoint,
    record_difference,
    records,
    relative_difference,
)
from tests.megatron.version_table import Table
from tests.versions import RELEASES, Megatron, started

HERE = Path(__file__).parent
LATEST = "latest_checkpointed_iteration.txt"
DISTRIBUTED = "--use-distributed-optimizer"
CANONICAL = "--dist-ckpt-optim-fully-reshardable"
WITHOUT_LOOP, *WITH_LOOP = RELEASES
NEWEST = RELEASES[-1]  # the environment's, which runs all other tests


def releases(versions: list[str] | tuple[str, ...], *, in_ci: tuple[str, ...] = RELEASES[:2]) -> Any:
    """Parameters for the fixture ``megatron``: those not ``in_ci`` go to tests/full.sh."""
    params = [pytest.param(v, id=v, marks=[] if v in in_ci else [pytest.mark.slow]) for v in versions]
    return pytest.mark.parametrize("megatron", params, indirect=True)


@pytest.fixture(scope="session")
def megatron(request: pytest.FixtureRequest) -> Iterator[Megatron]:
    yield from started(request.param)


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    """What is found is written over the cells of the page that MEGATRON_LION_VERSIONS_PAGE names; the others stay."""
    found = Table()
    yield found
    if page := os.environ.get("MEGATRON_LION_VERSIONS_PAGE"):
        found.write(ROOT / page)


def assert_all_on_lion(answers: list[dict[str, Any]], parameters: int) -> None:
    found = {name: owner for answer in answers for name, owner in answer["owners"].items()}
    assert len(found) == parameters
    assert {(owner["optimizer"], *owner["betas"]) for owner in found.values()} == {("ShardedLion", 0.8, 0.97)}
    assert {owner["weight_decay"] for owner in found.values()} == {0.0, 0.1}


def test_the_supported_releases_are_those_tested_here() -> None:
    assert compat_versions.RELEASES == RELEASES


@releases(RELEASES)
def test_doctor_is_ready_and_names_every_check(megatron: Megatron, table: Table) -> None:
    run = megatron.run("doctor", "--verbose", script=ROOT / "megatron_lion" / "cli" / "__main__.py")
    assert run.returncode == 0, run.output
    assert f"megatron-core          {megatron.version} (" in run.output
    checks = [line.split()[1] for line in run.output.splitlines() if line.startswith("  ok ")]
    assert f"all {len(checks)} checks passed" in run.output
    assert "READY: --optimizer lion would train every parameter" in run.output
    stock = next(line for line in run.output.splitlines() if line.startswith("  torchrun pretrain_gpt.py"))
    assert ("refused by stock Megatron" in stock) == (megatron.version in RELEASES[:2])
    table.add("`megatron-lion doctor`: every check passes", megatron, f"works ({len(checks)} checks)")


def declarations(megatron: Megatron, *what: str) -> Any:
    """The answer of declarations.py."""
    run = megatron.run(*what, script=HERE / "declarations.py")
    assert run.returncode == 0, run.output[-6000:]
    return json.loads(run.output.split("DECLARATIONS ")[-1])


@releases(RELEASES, in_ci=(RELEASES[0], NEWEST))
def test_all_that_is_replaced_overridden_and_read_is_declared(megatron: Megatron) -> None:
    answer = declarations(megatron)
    classes = answer.pop("classes")
    assert ("OlderDistributedOptimizer" in classes) == (
        not compat_versions.TRAITS[megatron.version[:4]].asks_for_state_keys
    )
    assert {"LionDistributedOptimizer", "LionChainedOptimizer", "OffloadingLion", "InitFromAdam"} < set(classes)
    assert not any(answer.values()), answer


@releases(RELEASES, in_ci=(NEWEST,))
def test_a_name_that_megatron_renames_is_refused_before_anything_is_replaced(megatron: Megatron) -> None:
    answer = declarations(megatron, "renamed")
    silent_before = {
        "_copy_model_params_to_main_params",
        "_set_main_param_and_optimizer_states",
        "_get_main_param_and_optimizer_states",
        "load_parameter_state_from_dp_reshardable",
        "model_param_gbuf_map",
        "shard_fp32_from_float16_groups",
        "model_float16_groups",
        "model_param_group_index_map",
        "param_index_map",
        "numel_unpadded",
    }
    assert silent_before < set(answer)
    for name, (message, built_by) in answer.items():
        assert f"{megatron.version} is incompatible" in message
        assert name in message
        assert built_by == "megatron.core.optimizer"


@releases(RELEASES, in_ci=(NEWEST,))
@pytest.mark.parametrize("flags", ["--bf16-gradients", "--bf16-gradients --fp8-weights", "--fp8-weights"])
def test_fp8_weights_are_refused_where_bf16_gradients_lead_to_the_precision_aware_path(
    megatron: Megatron, text: Path, flags: str
) -> None:
    run = megatron.run(
        f"--data {text}/train_text_document --iterations 1 --bf16", flags, ranks=2, script=HERE / "core_loop.py"
    )
    is_refused = len(flags.split()) == 2
    assert (run.returncode != 0) == is_refused, run.output[-3000:]
    assert ("fp8_param_gather=True is not supported where Lion writes" in run.output) == is_refused


# ---- Megatron's own loop ----


def probe(megatron: Megatron, text: Path, folder: Path, what: str, *flags: str) -> tuple[Run, list[dict[str, Any]]]:
    """A run of probe.py on two ranks, and the answer of each."""
    # The probe makes gradients by hand, outside the schedule that the NaN check belongs to.
    lines = (what, *pretrain_flags(text), "--train-iters 2 --no-check-for-nan-in-loss-and-grad", *flags)
    run = megatron.run(*lines, script=HERE / "probe.py", ranks=2, environment={"PROBE_OUTPUT": str(folder)})
    assert run.returncode == 0, run.output[-6000:]
    return run, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@releases(WITH_LOOP)
def test_every_parameter_is_on_lion_with_the_betas_asked_for(
    megatron: Megatron, text: Path, table: Table, tmp_path: Path
) -> None:
    flags = f"--optimizer lion --lion-beta1 0.8 --lion-beta2 0.97 {DISTRIBUTED} --bf16"
    run, answers = probe(megatron, text, tmp_path, "parameters", flags)
    assert "megatron-lion: lion on 28 of 28 parameters" in run.output
    assert_all_on_lion(answers, 28)
    table.add("`megatron.training`: every parameter on Lion, betas as asked", megatron)


@releases(WITH_LOOP, in_ci=("0.17.1",))
@pytest.mark.parametrize(
    "precision", [pytest.param("--bf16", id="bf16"), pytest.param("", id="fp32", marks=pytest.mark.slow)]
)
def test_a_sharded_step_equals_plain_lion_bit_for_bit(
    megatron: Megatron, text: Path, table: Table, tmp_path: Path, precision: str
) -> None:
    flags = f"--optimizer lion {DISTRIBUTED} --clip-grad 0 --ddp-bucket-size 20000 {precision}"
    for answer in probe(megatron, text, tmp_path, "sharded-step", flags)[1]:
        assert (answer["parameters"], answer["different"]) == (28, [])
    table.add("the sharded step equals plain Lion's bit for bit", megatron)


LION_RUN = f"--optimizer lion {DISTRIBUTED} {HORIZON} --train-iters 8 --save-interval 4"


def resumed(megatron: Megatron, text: Path, folder: Path, run: str, **options: Any) -> tuple[Run, Run]:
    """A whole run of 8 iterations and one from its checkpoint after 4, whose last checkpoints must be the same."""
    whole = megatron.pretrain(text, run, f"--save {folder}/whole", **options)
    shutil.copytree(folder / "whole" / "iter_0000004", folder / "cut" / "iter_0000004")
    (folder / "cut" / LATEST).write_text("4")
    rest = megatron.pretrain(text, run, f"--save {folder}/cut --load {folder}/cut", **options)
    assert min(rest.log.loss) == 5
    assert relative_difference(whole.log, rest.log) == 0.0
    assert_same_checkpoint(read_checkpoint(folder / "whole", 8), read_checkpoint(folder / "cut", 8))
    return whole, rest


@releases(WITH_LOOP)
def test_resume_bit_for_bit_and_the_one_process_curve_and_norm_ratio(
    megatron: Megatron, text: Path, table: Table, tmp_path: Path
) -> None:
    """Three runs on one text: two ranks, two ranks from a checkpoint of theirs, one process."""
    run = f"{LION_RUN} {CANONICAL} {NO_DROPOUT} --norm-ratio-at-start --norm-ratio-interval 8 --norm-ratio-batches 2"
    two, _ = resumed(megatron, text, tmp_path, f"{run} --overlap-grad-reduce --overlap-param-gather", ranks=2)
    one = megatron.pretrain(text, run, f"--save {tmp_path}/one", ranks=1)
    assert relative_difference(one.log, two.log) < 5e-6
    first, second, rest = (records(tmp_path / folder) for folder in ("one", "whole", "cut"))
    assert record_difference(first[0], second[0]) < 1e-6  # before the first step
    assert record_difference(second[1], rest[-1]) == 0.0  # after the last one
    table.add("`launch/pretrain_gpt.py`", megatron)
    table.add("DP 2 sharded: resumed equals uninterrupted, bit for bit", megatron)
    table.add("DP 2 sharded: the losses of one process", megatron)
    table.add("norm ratio rounds: repeated exactly, and those of one process", megatron)


VARIANTS = {
    "lion, bf16, overlap, `dp_reshardable`": (
        2,
        f"{LION_RUN} --bf16 --overlap-grad-reduce --overlap-param-gather --no-ckpt-fully-parallel-save",
    ),
    "lion, TP 2 x DP 2, sequence parallel, bf16, `fully_reshardable`": (
        4,
        f"{LION_RUN} {CANONICAL} --bf16 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "lion, PP 2, fp32, several buckets, `fully_reshardable`": (
        2,
        f"{LION_RUN} {CANONICAL} --pipeline-model-parallel-size 2 --ddp-bucket-size 20000 --overlap-grad-reduce",
    ),
    "lion, DP 2 not sharded, bf16": (2, f"--optimizer lion --bf16 {HORIZON} --train-iters 8 --save-interval 4"),
    "lion, bf16 momentum, remainders": (
        2,
        f"{LION_RUN} {CANONICAL} --bf16 --lion-momentum-dtype bf16 --lion-master-weights remainder",
    ),
    "lion, experts, EP 2": (
        2,
        f"{LION_RUN} {CANONICAL} --num-experts 4 --expert-model-parallel-size 2 --disable-bias-linear "
        "--moe-token-dispatcher-type allgather --norm-ratio-interval 4 --norm-ratio-batches 2",
    ),
    "sgd, sharded, bf16": (2, f"{LION_RUN.replace('lion', 'sgd')} {CANONICAL} --bf16"),
    "sgd without momentum, sharded": (2, f"{LION_RUN.replace('lion', 'sgd')} {CANONICAL} --sgd-momentum 0"),
    "adam, sharded, bf16": (2, f"{LION_RUN.replace('lion', 'adam')} {CANONICAL} --bf16"),
}


@pytest.mark.slow
@releases(WITH_LOOP, in_ci=RELEASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_bit_for_bit_in_other_shapes(
    megatron: Megatron, text: Path, table: Table, tmp_path: Path, variant: str
) -> None:
    ranks, flags = VARIANTS[variant]
    resumed(megatron, text, tmp_path, flags, ranks=ranks)
    table.add(f"resumed bit for bit: {variant}", megatron)


@pytest.mark.slow
@releases(WITH_LOOP, in_ci=RELEASES)
def test_tp2_pp2_gives_the_one_process_curve(megatron: Megatron, text: Path, table: Table, tmp_path: Path) -> None:
    flags = f"--optimizer lion {DISTRIBUTED} {CANONICAL} {HORIZON} {NO_DROPOUT} --make-vocab-size-divisible-by 256"
    start = megatron.pretrain(text, flags, f"--train-iters 8 --save {tmp_path} --save-interval 2")
    (tmp_path / LATEST).write_text("2")
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
    run = megatron.pretrain(text, flags, layout, f"--train-iters 8 --load {tmp_path} --no-load-rng", ranks=4)
    assert sorted(run.log.loss) == list(range(3, 9))
    assert relative_difference(start.log, run.log) < 5e-6
    table.add("TP 2 x PP 2 from a checkpoint of one process: its losses", megatron)


# ---- megatron.core alone ----


def core_run(megatron: Megatron, text: Path, *flags: str, ranks: int = 2, **options: Any) -> Run:
    data = f"--data {text}/train_text_document --iterations 8"
    run = megatron.run(data, *flags, ranks=ranks, script=HERE / "core_loop.py", **options)
    assert run.returncode == 0, run.output[-6000:]
    return run


@releases(RELEASES, in_ci=(WITHOUT_LOOP,))
def test_a_loop_on_megatron_core_alone(megatron: Megatron, text: Path, table: Table, tmp_path: Path) -> None:
    """Two ranks, two ranks from their checkpoint, one process; and which optimizer each parameter has."""
    save = "--save-interval 4 --overlap"
    whole = core_run(megatron, text, f"--save {tmp_path}/whole {save}", environment={"PROBE_OUTPUT": str(tmp_path)})
    assert_all_on_lion([json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)], 29)
    shutil.copytree(tmp_path / "whole" / "iter_0000004", tmp_path / "cut" / "iter_0000004")
    (tmp_path / "cut" / LATEST).write_text("4")
    rest = core_run(megatron, text, f"--save {tmp_path}/cut --load {tmp_path}/cut {save}")
    assert min(rest.log.loss) == 5
    assert {i: whole.log.loss[i] for i in rest.log.loss} == rest.log.loss
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 8), read_checkpoint(tmp_path / "cut", 8))
    one = core_run(megatron, text, ranks=1)
    assert relative_difference(one.log, whole.log) < 5e-6
    table.add("a loop on `megatron.core` alone, DP 2: on Lion, resumed bit for bit, one process's losses", megatron)


@pytest.mark.slow
@releases(RELEASES, in_ci=RELEASES)
@pytest.mark.parametrize("sharding", ["dp_reshardable", "dp_zero_gather_scatter"])
def test_core_checkpoints_in_other_formats(
    megatron: Megatron, text: Path, table: Table, tmp_path: Path, sharding: str
) -> None:
    flags = f"--bf16 --sharding {sharding} --save-interval 4"
    whole = core_run(megatron, text, flags, f"--save {tmp_path}")
    (tmp_path / LATEST).write_text("4")
    rest = core_run(megatron, text, flags, f"--load {tmp_path}")
    assert {i: whole.log.loss[i] for i in rest.log.loss} == rest.log.loss
    table.add(f"`megatron.core` alone: `{sharding}` checkpoints", megatron)


@releases([WITHOUT_LOOP])
def test_our_scripts_say_that_this_wheel_has_no_loop(megatron: Megatron, text: Path, table: Table) -> None:
    run = megatron.pretrain(text, "--optimizer lion", kill_at=1, script=PRETRAIN_GPT)
    assert run.returncode == 2
    (message,) = [line for line in run.output.splitlines() if "error:" in line]
    assert f"megatron-core {megatron.version} is released without Megatron's own loop" in message
    assert "torchrun -m megatron_lion.run /path/to/Megatron-LM/pretrain_gpt.py" in message
    table.add("`launch/pretrain_gpt.py`", megatron, "refused: released without Megatron's own loop")


@releases([WITHOUT_LOOP])
def test_text_preparation_says_that_this_wheel_builds_no_tokenizer(
    megatron: Megatron, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "some"}\n')
    tokenizer = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {text}/tokenizer.model"
    where = f"--input {tmp_path}/text.jsonl --output-prefix {tmp_path}/out --workers 1"
    run = megatron.run(where, tokenizer, script=ROOT / "tools" / "prepare_text.py")
    assert run.returncode not in (0, -9)
    assert f"tokenizers are built by megatron-core, 0.17 or later; this is {megatron.version}" in run.output


@pytest.mark.parametrize("minor", ["0.16", "0.18"])
def test_evaluation_needs_a_loop_that_builds_the_model(minor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation import scoring

    traits = compat_versions.TRAITS[minor]
    monkeypatch.setattr("megatron_lion.integration.loop.pretrain.installed_traits", lambda: traits)
    with pytest.raises(LionError, match=r"evaluation needs a Megatron loop that builds a GPT.*0\.19 or later"):
        scoring.build_model(None)


def test_the_version_of_a_megatron_is_read_once(tmp_path: Path) -> None:
    """Each micro-batch asks for it, and its file may be on a network."""
    info = tmp_path / "package_info.py"
    info.write_text("MAJOR = 0\nMINOR = 19\nPATCH = 2\n")
    assert compat_versions.version_at(tmp_path) == "0.19.2"
    info.unlink()
    assert compat_versions.version_at(tmp_path) == "0.19.2"
