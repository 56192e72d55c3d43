"""Lion under Megatron-FSDP: the distributed optimizer's losses, whole updates, counts, and what is refused."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lion.config import LionError, LionOptions
from megatron_lion.integration import compat
from megatron_lion.integration.compat.versions import TRAITS
from megatron_lion.integration.optimizer import refusals
from tests.harness import (
    assert_same_checkpoint,
    outcomes_of,
    pretrain,
    pretrain_flags,
    read_checkpoint,
    relative_difference,
    run_ranks,
)
from tests.megatron.fsdp_runs import FP32_GRADIENTS, FSDP, MOE, NO_SHARD, RUN, pretrain_or_fail, put_state_of, saving
from tests.versions import since

pytestmark = since("0.17")

PROBE = Path(__file__).with_name("fsdp_probe.py")
KINDS = PROBE.with_name("kinds.py")
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
STRATEGIES = (NO_SHARD, "optim", "optim_grads", "optim_grads_params")
PRECISIONS = {
    "fp32": ("", 5e-6),
    "bf16": ("--bf16", 5e-5),
}
SAVED_AT, LAST = 2, 8
HSDP = "--num-distributed-optimizer-instances 2 --overlap-grad-reduce"
TP_2 = "--tensor-model-parallel-size 2 --sequence-parallel"
OPTIM = "--data-parallel-sharding-strategy optim"  # the last one given applies
# Ranks, and flags of a layout.
LAYOUTS = {
    "TP 2 x DP 2, swiglu": (4, f"{TP_2} --swiglu --bf16"),
    "EP 2 x DP 2": (4, MOE),
    "EP 2, experts with one replica": (2, f"{MOE} {OPTIM}"),
    "two instances (HSDP)": (4, HSDP),
}


# ---- losses ----


@pytest.fixture(scope="module", params=PRECISIONS)
def same_start(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A run of the distributed optimizer, and its second iteration's state as a checkpoint of Megatron-FSDP."""
    flags, tolerance = PRECISIONS[request.param]
    folder = tmp_path_factory.mktemp("start")
    run = f"{RUN} {flags}"
    reference = pretrain(
        text, run, DISTRIBUTED, saving(folder / "distributed", SAVED_AT), f"--train-iters {LAST}", ranks=2
    )
    once = f"{saving(folder / 'fsdp', SAVED_AT)} --train-iters {LAST} --exit-interval {SAVED_AT}"
    pretrain(text, run, f"{FSDP} optim_grads_params", once, ranks=2)
    put_state_of(folder / "distributed", folder / "fsdp", SAVED_AT, folder / "start")
    return run, reference, folder / "start", tolerance


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.supports(
    "Megatron-FSDP (`--use-megatron-fsdp`): no_shard, optim, optim_grads, optim_grads_params",
    "DP 2, fp32 and bf16, from one checkpoint: losses of the distributed optimizer, to 5e-6 (fp32) and 5e-5 (bf16)",
)
def test_losses_are_those_of_the_distributed_optimizer(text: Path, same_start: tuple, strategy: str) -> None:
    run, reference, start, tolerance = same_start
    fsdp = pretrain(text, run, FP32_GRADIENTS, f"{FSDP} {strategy} --load {start} --train-iters {LAST}", ranks=2)
    assert min(fsdp.log.loss) == SAVED_AT + 1
    assert max(fsdp.log.loss) == LAST
    assert relative_difference(fsdp.log, reference.log) <= tolerance
    assert "lion on 28 of 28 parameters" in fsdp.output
    assert f"Megatron-FSDP {strategy}, " in fsdp.output


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(name, marks=[since("0.18")] * ("TP" in name)) for name in LAYOUTS])
@pytest.mark.supports(
    "Megatron-FSDP with TP, EP and HSDP",
    "losses of the distributed optimizer to 5e-6 (fp32) and 5e-5 (TP, in bf16), resumed bit for bit",
)
def test_layouts_train_as_the_distributed_optimizer_and_resume(text: Path, tmp_path: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    is_bf16 = "--bf16" in flags  # where a router may choose another expert
    run = f"{RUN} {flags} --train-iters 4"
    reference = pretrain(text, run, "--use-distributed-optimizer", ranks=ranks)
    sharded = f"{FSDP} optim_grads_params {run} {FP32_GRADIENTS * is_bf16}"
    whole = pretrain(text, sharded, saving(tmp_path / "whole", 2), ranks=ranks)
    assert relative_difference(whole.log, reference.log) <= (5e-5 if is_bf16 else 5e-6)
    [started] = [line for line in whole.ours() if "lion on" in line]
    assert started.split(", betas")[0] in reference.output  # as many parameters and elements
    resumed = f"--load {tmp_path / 'whole'} --ckpt-step 2 {saving(tmp_path / 'resumed', 2)}"
    pretrain(text, sharded, resumed, ranks=ranks)
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 4), read_checkpoint(tmp_path / "resumed", 4))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [NO_SHARD, "optim_grads_params"])
@pytest.mark.supports("Megatron-FSDP: a NaN gradient on one rank", "no rank changes a parameter or a momentum")
def test_an_update_is_skipped_by_all_ranks(text: Path, strategy: str) -> None:
    flags = f"{RUN} --bf16 {FSDP} {strategy} --train-iters 4 --no-check-for-nan-in-loss-and-grad"
    steps = outcomes_of(PROBE, *pretrain_flags(text), flags, ranks=2)
    done, skipped = "applied on 2, unchanged on 0", "applied on 0, unchanged on 2"
    assert steps == {f"step {step}": skipped if step == 3 else done for step in range(1, 5)}


@pytest.mark.slow
@pytest.mark.supports("Megatron-FSDP: `--lion-telemetry`", "each element once: the distributed optimizer's sums")
@pytest.mark.parametrize("strategy", [NO_SHARD, "optim_grads_params"])
def test_telemetry_counts_each_element_once(text: Path, strategy: str) -> None:
    run = f"{RUN} --lion-telemetry --train-iters 2"
    one = pretrain(text, run, "--use-distributed-optimizer", ranks=2)
    other = pretrain(text, run, f"{FSDP} {strategy}", ranks=2)
    first, second = ([line for line in found.ours() if "step 1: gradient" in line] for found in (one, other))
    assert re.search(r"\((\d+) elements\)", first[0])[1] == re.search(r"\((\d+) elements\)", second[0])[1]
    sums = [list(map(float, re.findall(r"(?:l1|l2|agreement) ([\d.e+-]+)", lines[0]))) for lines in (first, second)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)


# ---- refusals ----


# A shard group of one rank, in which gradients are divided by the number of data-parallel ranks.
ONE_RANK = {"experts": MOE, "parameters": HSDP}


@pytest.mark.slow
@pytest.mark.parametrize("what", ONE_RANK)
@pytest.mark.refuses("Megatron-FSDP: optim_grads and optim_grads_params in a shard group of one rank")
def test_a_shard_group_of_one_rank_is_refused(text: Path, what: str) -> None:
    output = pretrain_or_fail(text, f"{RUN} {ONE_RANK[what]} --train-iters 1 {FSDP} optim_grads_params", ranks=2)
    assert f"where one rank shards its {what} with no other: Megatron-FSDP divides their gradients again" in output


@pytest.mark.slow
@pytest.mark.refuses("Megatron-FSDP: 8-bit momentum where a shard boundary cuts a block of 32 elements")
def test_a_block_of_8_bit_momentum_is_not_cut(text: Path) -> None:
    # Matrices are frozen, so the vectors of a layer, 624 elements, are sharded by themselves: at the 312th.
    run = f"{RUN} --bf16 --hidden-size 48 --lion-momentum-dtype int8 --train-iters 1 {FSDP} optim_grads_params"
    failed = run_ranks("vectors", *pretrain_flags(text), run, ranks=2, script=KINDS)
    assert failed.returncode != 0
    assert "with Megatron-FSDP on 2 ranks a shard boundary cuts a block of 32 elements in module." in failed.output
    assert "pre_mlp_layernorm.weight of shape (48,). Use --lion-momentum-dtype bf16, or another" in failed.output


SETTINGS = {
    "fp16": (True, "--fp16 is not supported", "Use --bf16"),
    "optimizer_cpu_offload": (True, "--optimizer-cpu-offload is not supported", "Remove one of them"),
    "use_precision_aware_optimizer": (True, "--use-precision-aware-optimizer is not", "--lion-momentum-dtype bf16"),
    "overlap_param_gather_with_optimizer_step": (True, "--overlap-param-gather-with-optimizer-step is not", "Remove"),
    "megatron_fsdp_version": (2, "--megatron-fsdp-version 2 is not supported", "cannot save", "Use 1"),
    "megatron_fsdp_main_params_dtype": (torch.bfloat16, "--megatron-fsdp-main-params-dtype bf16 is not", "Use fp32"),
    "master_weights": ("remainder", "--lion-master-weights remainder is not supported", "Use fp32"),
    "gather": ("signs", "--lion-gather signs is not supported", "Use params"),
    "reduce": ("int4", "--lion-reduce int4 is not supported", "Use stock"),
    "bf16": (False, "--swiglu in fp32 is not supported", "Add --bf16"),
    "is_gated": (True, "no_shard with --swiglu is not supported", "cannot save", "Use another strategy"),
    "pipeline_stages": (2, "--pipeline-model-parallel-size 2 is not supported", "Use tensor parallelism"),
}


def command_line(**changed: Any) -> SimpleNamespace:
    same = {"bf16": True, "megatron_fsdp_main_params_dtype": torch.float32}
    return SimpleNamespace(**{**same, "data_parallel_sharding_strategy": "optim", **changed})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.refuses("Megatron-FSDP with fp16, PP, CPU offload, remainders, gathered signs or its version 2")
def test_what_is_not_supported_is_refused_with_what_to_do(name: str) -> None:
    value, *messages = SETTINGS[name]
    settings = command_line()
    model, options = {"pipeline_stages": 1, "is_gated": False}, LionOptions()
    if name in model:
        model[name] = value
    elif hasattr(options, name):
        options = LionOptions(**{name: value})
    else:
        setattr(settings, name, value)
    if name == "bf16":
        model["is_gated"] = True
    if name == "is_gated":
        settings.data_parallel_sharding_strategy = "no_shard"
        if "no_shard" not in compat.installed_traits().fsdp_strategies:
            pytest.skip("this release refuses no_shard as a whole")
    with pytest.raises(LionError) as error:
        refusals.refuse_fsdp_settings(settings, settings, options, **model)
    for message in (*messages, "with --optimizer lion and --use-megatron-fsdp"):
        assert message in str(error.value)


def test_what_is_supported_is_not_refused() -> None:
    for settings in (
        command_line(megatron_fsdp_main_params_dtype="fp32"),  # before Megatron validates it
        command_line(bf16=False, megatron_fsdp_main_params_dtype=None),
        command_line(data_parallel_sharding_strategy="optim_grads"),
    ):
        is_gated = settings.data_parallel_sharding_strategy == "optim_grads"
        refusals.refuse_fsdp_settings(settings, settings, LionOptions(momentum_dtype="int8"), 1, is_gated)


@pytest.mark.parametrize(
    ("minor", "strategy", "message"),
    [
        ("0.16", "optim", "it was not run. Use 0.17 to 0.19, or --use-distributed-optimizer"),
        ("0.17", "no_shard", "Megatron fails in the first step, with any optimizer. Use another strategy"),
    ],
)
@pytest.mark.refuses("Megatron-FSDP on 0.16, and its strategy no_shard on 0.17")
def test_what_a_release_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, minor: str, strategy: str, message: str
) -> None:
    monkeypatch.setattr(compat, "installed_traits", lambda: TRAITS[minor])
    settings = command_line(data_parallel_sharding_strategy=strategy)
    with pytest.raises(LionError) as error:
        refusals.refuse_fsdp_settings(settings, settings, LionOptions(), 1, False)
    assert message in str(error.value)
