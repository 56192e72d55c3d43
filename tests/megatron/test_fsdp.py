"""Lion under Megatron-FSDP: the distributed optimizer's losses, and checkpoints that any number of ranks resumes."""

from pathlib import Path

import pytest
import torch

from tests.harness import (
    HORIZON,
    NO_DROPOUT,
    assert_same_checkpoint,
    pretrain,
    read_checkpoint,
    relative_difference,
)
from tests.megatron.fsdp_checkpoints import put_state_of
from tests.versions import since

pytestmark = since("0.19")

FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy"
RUN = f"--optimizer lion {HORIZON} {NO_DROPOUT} --make-vocab-size-divisible-by 256"
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
# With bf16 weights the distributed optimizer reduces fp32 gradients, FSDP 16-bit ones unless told so.
PRECISIONS = {
    "fp32": ("", 5e-6),
    "bf16": ("--bf16", 5e-5),
}
FP32_GRADIENTS = "--megatron-fsdp-main-grads-dtype fp32 --megatron-fsdp-grad-comm-dtype fp32"
SAVED_AT, LAST = 2, 8
HSDP = "--num-distributed-optimizer-instances 2"
TP_2 = "--tensor-model-parallel-size 2 --sequence-parallel"
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--moe-token-dispatcher-type allgather --disable-bias-linear --expert-model-parallel-size 2"
)
# Ranks, and flags of a layout.
LAYOUTS = {
    "TP 2 x DP 2, swiglu": (4, f"{TP_2} --swiglu"),
    "EP 2": (2, MOE),
    "EP 2 x DP 2": (4, MOE),
    "two instances (HSDP)": (4, HSDP),
}


def saving(folder: Path, interval: int) -> str:
    return f"--save {folder} --save-interval {interval}"


def slow_but(case: str, fast: str) -> list[pytest.MarkDecorator]:
    return [] if case == fast else [pytest.mark.slow]


# ---- losses ----


@pytest.fixture(scope="module", params=PRECISIONS)
def same_start(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A run of the distributed optimizer, and its second iteration's state as a checkpoint of Megatron-FSDP."""
    flags, tolerance = PRECISIONS[request.param]
    folder = tmp_path_factory.mktemp("start")
    run = f"{RUN} {flags} --swiglu"
    reference = pretrain(
        text, run, DISTRIBUTED, saving(folder / "distributed", SAVED_AT), f"--train-iters {LAST}", ranks=2
    )
    once = f"{saving(folder / 'fsdp', SAVED_AT)} --train-iters {SAVED_AT}"
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
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.supports(
    "Megatron-FSDP with TP, EP and HSDP",
    "losses of the distributed optimizer to 5e-5, resumed bit for bit",
)
def test_layouts_train_as_the_distributed_optimizer_and_resume(text: Path, tmp_path: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    run = f"{RUN} {flags} --train-iters 4 --bf16"
    reference = pretrain(text, run, "--use-distributed-optimizer", ranks=ranks)
    sharded = f"{run} {FSDP} optim_grads_params {FP32_GRADIENTS}"
    whole = pretrain(text, sharded, saving(tmp_path / "whole", 2), ranks=ranks)
    assert relative_difference(whole.log, reference.log) <= 5e-5
    [started] = [line for line in whole.ours() if "lion on" in line]
    assert started.split(", betas")[0] in reference.output  # as many parameters and elements
    resumed = f"--load {tmp_path / 'whole'} --ckpt-step 2 {saving(tmp_path / 'resumed', 2)}"
    pretrain(text, sharded, resumed, ranks=ranks)
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 4), read_checkpoint(tmp_path / "resumed", 4))


# ---- checkpoints ----

STORAGES = {
    "fp32": "",
    "bf16": "--bf16",
    "bf16 momentum": "--bf16 --lion-momentum-dtype bf16",
    "int8 momentum": "--bf16 --lion-momentum-dtype int8",
}


@pytest.mark.parametrize(
    ("strategy", "storage"),
    [
        pytest.param(strategy, storage, marks=slow_but(f"{strategy}, {storage}", "optim_grads_params, bf16"))
        for strategy, storages in {
            "no_shard": ("bf16", "int8 momentum"),
            "optim": ("bf16", "bf16 momentum"),
            "optim_grads": ("bf16",),
            "optim_grads_params": tuple(STORAGES),
        }.items()
        for storage in storages
    ],
)
@pytest.mark.supports(
    "Megatron-FSDP: `fsdp_dtensor` checkpoints, momentum in fp32, bf16 or int8, swiglu",
    "DP 2, resumed at the same DP: the final checkpoint is an uninterrupted run's bit for bit",
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(text: Path, tmp_path: Path, strategy: str, storage: str) -> None:
    run = f"{RUN} --swiglu {STORAGES[storage]} {FSDP} {strategy} --train-iters 4"
    pretrain(text, run, saving(tmp_path / "whole", 2), ranks=2)
    resumed = pretrain(
        text, run, f"--load {tmp_path / 'whole'} --ckpt-step 2 {saving(tmp_path / 'resumed', 2)}", ranks=2
    )
    assert min(resumed.log.loss) == 3
    last = read_checkpoint(tmp_path / "whole", 4)
    assert_same_checkpoint(last, read_checkpoint(tmp_path / "resumed", 4))
    momenta = [tensor for key, tensor in last.items() if key.endswith(".exp_avg")]
    assert len(momenta) == 32  # 28, of which 4 are halves of swiglu's
    assert {tensor.dtype for tensor in momenta} == {torch.float32}
    assert all(tensor.any() for tensor in momenta)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("strategy", ["optim", "optim_grads_params"])
@pytest.mark.supports(
    "Megatron-FSDP: another number of data-parallel ranks",
    "saved with DP 2, loaded and saved again with DP 4, then DP 2: weights and momentum bit for bit",
)
def test_a_checkpoint_is_loaded_by_another_number_of_ranks(
    text: Path, tmp_path: Path, storage: str, strategy: str
) -> None:
    run = f"{RUN} --swiglu {STORAGES[storage]} {FSDP} {strategy}"
    folders = [tmp_path / name for name in ("first", "four", "two")]
    first = pretrain(text, run, f"{saving(folders[0], 2)} --train-iters 4", ranks=2)
    before = tensors_of(read_checkpoint(folders[0], 2))
    for ranks, source, target in ((4, folders[0], folders[1]), (2, folders[1], folders[2])):
        # Trains nothing: Megatron saves at the end where the last iteration is no multiple of the interval.
        step = f"--load {source} --ckpt-step 2 {saving(target, 5)} --train-iters 2"
        pretrain(text, run, step, ranks=ranks)
        assert_same_checkpoint(before, tensors_of(read_checkpoint(target, 2)))
    again = pretrain(text, run, f"--load {folders[2]} --train-iters 4", ranks=4)
    assert relative_difference(first.log, again.log) <= 5e-5


def tensors_of(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights and momenta; other tensors are of the random generators."""
    return {key: tensor for key, tensor in checkpoint.items() if key.startswith(("model.", "optimizer.state."))}
