"""Megatron-FSDP's checkpoints with Lion's state: resumed, resharded, continued from Adam's, cut off and damaged."""

import random
from pathlib import Path

import pytest
import torch

from tests.harness import assert_same_checkpoint, pretrain, read_checkpoint, relative_difference
from tests.megatron.fsdp_runs import FP32_GRADIENTS, FSDP, NO_SHARD, RUN, pretrain_or_fail, saving, tensors_of
from tests.versions import since

pytestmark = since("0.17")

MOMENTUM = {"adam": "Adam's exp_avg, bit for bit", "fresh": "zero"}


def marks_of(strategy: str, storage: str) -> list[pytest.MarkDecorator]:
    is_fast = (strategy, storage) == ("optim_grads_params", "bf16")
    return [*[pytest.mark.slow] * (not is_fast), *NO_SHARD.marks * (strategy == "no_shard")]


STORAGES = {
    "fp32": "",
    "bf16": "--bf16",
    "bf16 momentum": "--bf16 --lion-momentum-dtype bf16",
    "int8 momentum": "--bf16 --lion-momentum-dtype int8",
}


@pytest.mark.parametrize(
    ("strategy", "storage"),
    [
        pytest.param(strategy, storage, marks=marks_of(strategy, storage))
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
    gated = "" if strategy == "no_shard" or storage == "fp32" else "--swiglu"
    run = f"{RUN} {gated} {STORAGES[storage]} {FSDP} {strategy} --train-iters 4"
    pretrain(text, run, saving(tmp_path / "whole", 2), ranks=2)
    resumed = pretrain(
        text, run, f"--load {tmp_path / 'whole'} --ckpt-step 2 {saving(tmp_path / 'resumed', 2)}", ranks=2
    )
    assert min(resumed.log.loss) == 3
    last = read_checkpoint(tmp_path / "whole", 4)
    assert_same_checkpoint(last, read_checkpoint(tmp_path / "resumed", 4))
    momenta = [tensor for key, tensor in last.items() if key.endswith(".exp_avg")]
    assert len(momenta) == (32 if gated else 28)  # swiglu's are saved in halves
    assert {tensor.dtype for tensor in momenta} == {torch.float32}
    assert all(tensor.any() for tensor in momenta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "storage"),
    [("optim", "bf16"), ("optim_grads", "fp32"), *(("optim_grads_params", storage) for storage in STORAGES)],
)
@pytest.mark.supports(
    "Megatron-FSDP: another number of data-parallel ranks",
    "saved with DP 2, loaded and saved again with DP 4, then DP 2: weights and momentum bit for bit",
)
def test_a_checkpoint_is_loaded_by_another_number_of_ranks(
    text: Path, tmp_path: Path, strategy: str, storage: str
) -> None:
    gated = "" if storage == "fp32" else "--swiglu"
    run = f"{RUN} {gated} {STORAGES[storage]} {FSDP} {strategy} {FP32_GRADIENTS}"
    folders = [tmp_path / name for name in ("first", "four", "two")]
    first = pretrain(text, run, f"{saving(folders[0], 2)} --train-iters 5", ranks=2)
    before = tensors_of(read_checkpoint(folders[0], 2))
    for ranks, source, target in ((4, folders[0], folders[1]), (2, folders[1], folders[2])):
        # Trains nothing: Megatron saves at the end where the last iteration is no multiple of the interval.
        step = f"--load {source} --ckpt-step 2 {saving(target, 5)} --train-iters 2 --override-opt_param-scheduler"
        pretrain(text, run, step, ranks=ranks)
        assert_same_checkpoint(before, tensors_of(read_checkpoint(target, 2)))
    again = pretrain(text, run, f"--load {folders[2]} --train-iters 5 --override-opt_param-scheduler", ranks=4)
    assert relative_difference(first.log, again.log) <= 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("momentum", ["adam", "fresh"])
@pytest.mark.supports("Megatron-FSDP: `--lion-init-from`", "masters and, if requested, momentum are Adam's bit for bit")
def test_lion_continues_an_adam_run(text: Path, tmp_path: Path, momentum: str) -> None:
    run = f"{RUN} --bf16 {FSDP} optim_grads_params --train-iters 2"
    # On one rank: on several, stock's Adam waits for ever in a save, as some ranks have no state of some parameters.
    pretrain(text, run, "--optimizer adam --use-distributed-optimizer", saving(tmp_path / "adam", 2))
    step = f"--load {tmp_path / 'adam'} {saving(tmp_path / 'lion', 5)}"
    refused = pretrain_or_fail(text, run, step, ranks=2)
    assert "was written by adam, and this run's optimizer is lion. --lion-init-from adam continues" in refused
    lion = pretrain(text, run, step, f"--lion-init-from {momentum}", ranks=2)
    assert f"continuing an Adam run: master weights kept, momentum {MOMENTUM[momentum]}" in lion.output
    adams, lions = (tensors_of(read_checkpoint(tmp_path / name, 2)) for name in ("adam", "lion"))
    assert lions.keys() == {key for key in adams if not key.endswith((".exp_avg_sq", ".step"))}
    for key, tensor in lions.items():
        expected = torch.zeros_like(tensor) if key.endswith(".exp_avg") and momentum == "fresh" else adams[key]
        assert torch.equal(tensor, expected), key
    # The flag may stay: the checkpoint is Lion's now.
    again = f"--load {tmp_path / 'lion'} {saving(tmp_path / 'again', 5)} --lion-init-from {momentum}"
    assert "continuing an Adam run" not in pretrain(text, run, again, ranks=2).output
    assert_same_checkpoint(lions, tensors_of(read_checkpoint(tmp_path / "again", 2)))


@pytest.mark.slow
@pytest.mark.supports("Megatron-FSDP: learning rates of a resumed run", "the command line's or the checkpoint's")
def test_a_resumed_run_takes_its_rates_from_the_command_line_or_the_checkpoint(text: Path, tmp_path: Path) -> None:
    run = f"{RUN} {FSDP} optim --train-iters"
    pretrain(text, f"{run} 2", saving(tmp_path, 2), ranks=2)
    resumed = f"{run} 3 --load {tmp_path} --lr 5e-5 --min-lr 5e-5"
    assert "this run changes --lr 0.0001 to 5e-05" in pretrain_or_fail(text, resumed, ranks=2)
    for flag, low in (("--override-opt_param-scheduler", True), ("--use-checkpoint-opt_param-scheduler", False)):
        output = pretrain(text, resumed, flag, ranks=2).output
        assert ("learning rate: 5.000000E-05" in output) is low, flag


@pytest.mark.slow
@pytest.mark.refuses("Megatron-FSDP: a checkpoint of the distributed optimizer, and the reverse")
def test_the_two_ways_to_shard_do_not_read_each_others_checkpoints(text: Path, tmp_path: Path) -> None:
    runs = {"torch_dist": f"{RUN} --use-distributed-optimizer", "fsdp_dtensor": f"{RUN} {FSDP} optim_grads_params"}
    for one, other in (runs, reversed(runs)):
        pretrain(text, runs[one], f"--train-iters 2 {saving(tmp_path / one, 2)}", ranks=2)
        output = pretrain_or_fail(text, runs[other], f"--load {tmp_path / one} --train-iters 3", ranks=2)
        assert f"is in the format {one} and this run's is {other}: Megatron-FSDP reads only fsdp_dtensor" in output


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--no-load-optim", "--finetune"])
@pytest.mark.supports("Megatron-FSDP: only the weights of a checkpoint", "bf16, fp32 masters bit for bit")
def test_only_the_weights_are_loaded(text: Path, tmp_path: Path, flag: str) -> None:
    run = f"{RUN} --bf16 {FSDP} optim_grads_params"
    pretrain(text, run, f"--train-iters 2 {saving(tmp_path / 'first', 2)}", ranks=2)
    # A rate of almost 0 leaves the weights as they are.
    step = f"--load {tmp_path / 'first'} {flag} --lr 1e-30 --min-lr 0 --train-iters 3 {saving(tmp_path / 'next', 1)}"
    loaded = pretrain(text, run, step, "--override-opt_param-scheduler", ranks=2)
    first = read_checkpoint(tmp_path / "first", 2)
    then = read_checkpoint(tmp_path / "next", max(loaded.log.loss))
    assert all(torch.equal(tensor, then[key]) for key, tensor in first.items() if key.startswith("model."))


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(8))
@pytest.mark.supports(
    "Megatron-FSDP: SIGKILL of one rank or of all at a random moment, also inside a save",
    "resumed, the final checkpoint equals an uninterrupted run's bit for bit",
)
def test_a_killed_run_resumes_as_if_nothing_had_happened(text: Path, tmp_path: Path, moment: int) -> None:
    dice = random.Random(moment)
    run = f"{RUN} --bf16 --swiglu {FSDP} optim_grads_params --train-iters 4"
    pretrain(text, run, saving(tmp_path / "whole", 4), ranks=2)
    killed = f"{run} {saving(tmp_path / 'killed', 1)} --load {tmp_path / 'killed'}"
    kill = {"kill_at": dice.randrange(1, 4), "kill_after": dice.uniform(0.0, 1.2)}
    pretrain(text, killed, ranks=2, kill_rank=None if moment % 2 else 1, **kill)
    pretrain(text, killed, ranks=2)
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 4), read_checkpoint(tmp_path / "killed", 4))


@pytest.mark.slow
@pytest.mark.supports("Megatron-FSDP: a damaged checkpoint", "named in one line, nothing is loaded")
def test_damage_is_named(text: Path, tmp_path: Path) -> None:
    run = f"{RUN} {FSDP} optim_grads_params --train-iters 4"
    pretrain(text, run, saving(tmp_path, 2), ranks=2)
    file = max((tmp_path / "iter_0000004").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    output = pretrain_or_fail(text, run, f"--load {tmp_path}", ranks=2)
    assert f"{file} is damaged or cut short" in output
    assert "--ckpt-step (2)" in output
