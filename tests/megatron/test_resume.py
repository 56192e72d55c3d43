"""A run that was killed and resumed equals one that never stopped, bit for bit, with dropout on."""

import contextlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lion.config import LionError
from megatron_lion.integration.checkpoint.group_settings import refuse_other_rates
from megatron_lion.integration.compat import installed_traits
from tests.harness import HORIZON, WORKERS, assert_same_checkpoint, pretrain, read_checkpoint, relative_difference

# Parameter by parameter, instead of in buckets whose padding is never initialized.
CANONICAL = "--dist-ckpt-optim-fully-reshardable"
DISTRIBUTED = "--use-distributed-optimizer"
LATEST = "latest_checkpointed_iteration.txt"

CASES = {
    "lion, TP 2 x DP 2, sharded, bf16, overlap": (
        4,
        f"--optimizer lion {DISTRIBUTED} {CANONICAL} --tensor-model-parallel-size 2 --sequence-parallel --bf16 "
        "--overlap-grad-reduce --overlap-param-gather",
    ),
    "lion, PP 2, sharded, fp32": (2, f"--optimizer lion {DISTRIBUTED} {CANONICAL} --pipeline-model-parallel-size 2"),
    "lion, one process, fp32": (1, "--optimizer lion"),
    "lion, DP 2, not sharded, bf16": (2, "--optimizer lion --bf16"),
    "sgd, DP 2, sharded, bf16": (2, f"--optimizer sgd {DISTRIBUTED} {CANONICAL} --bf16"),
    "sgd without momentum, DP 2, sharded": (2, f"--optimizer sgd --sgd-momentum 0 {DISTRIBUTED} {CANONICAL}"),
    "sgd, one process, fp32": (1, "--optimizer sgd"),
    "adam, DP 2, sharded, fp32": (2, f"--optimizer adam {DISTRIBUTED}"),
    "adam, DP 2, sharded, bf16, canonical": (2, f"--optimizer adam {DISTRIBUTED} {CANONICAL} --bf16"),
}


# What these show beside the others is rare enough for tests/full.sh.
SLOW = (
    "lion, DP 2, not sharded, bf16",
    "sgd without momentum, DP 2, sharded",
    "adam, DP 2, sharded, bf16, canonical",
    "lion, one process, fp32",
    "sgd, one process, fp32",
)


@pytest.mark.supports(
    "SIGKILL after a checkpoint, then resume; SGD and Adam too",
    "losses and every tensor of the final checkpoint, bit for bit, dropout on",
)
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, case in CASES.items()],
)
@pytest.mark.supports("Megatron's loop / resume", "on gloo ranks")
def test_a_run_killed_after_a_checkpoint_and_resumed_equals_the_uninterrupted_one(
    text: Path, tmp_path: Path, ranks: int, flags: str
) -> None:
    run = f"{flags} {WORKERS} {HORIZON} --train-iters 8 --save-interval 4"
    whole = pretrain(text, run, f"--save {tmp_path}/whole", ranks=ranks)
    killed = pretrain(text, run, f"--save {tmp_path}/cut", ranks=ranks, kill_at=6)
    assert killed.returncode != 0
    assert max(killed.log.loss) < 8
    assert not (tmp_path / "cut/iter_0000008").exists()
    resumed = pretrain(text, run, f"--save {tmp_path}/cut --load {tmp_path}/cut", ranks=ranks)
    assert min(resumed.log.loss) == 5
    assert relative_difference(whole.log, resumed.log) == 0.0
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 8), read_checkpoint(tmp_path / "cut", 8))


@pytest.mark.supports("resume at another DP size", "loss curve to 5e-6 relative")
@pytest.mark.parametrize("other_ranks", [1, 4])
def test_resume_at_another_data_parallel_size(text: Path, tmp_path: Path, other_ranks: int) -> None:
    flags = f"--optimizer lion {DISTRIBUTED} {HORIZON} --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 1"
    whole = pretrain(text, flags, f"--train-iters 10 --save {tmp_path} --save-interval 4", ranks=2)
    (tmp_path / LATEST).write_text("4")
    resumed = pretrain(text, flags, f"--train-iters 10 --load {tmp_path}", ranks=other_ranks)
    assert min(resumed.log.loss) == 5
    # The state is the same; sums over ranks are rounded in another order, and each rounding may flip a sign of c.
    assert relative_difference(whole.log, resumed.log) < 5e-6


def test_the_command_lines_betas_win_over_the_checkpoints_and_it_is_said(text: Path, tmp_path: Path) -> None:
    flags = f"--optimizer lion {DISTRIBUTED} {HORIZON} --train-iters 4"
    pretrain(text, flags, f"--save {tmp_path} --save-interval 2 --exit-interval 2")
    resumed = pretrain(text, flags, f"--load {tmp_path} --lion-beta2 0.98")
    assert any(
        "betas (0.9, 0.98) as asked; the checkpoint was written with (0.9, 0.95)" in line for line in resumed.ours()
    )


SHARDINGS = {"sharded": f"{DISTRIBUTED} {CANONICAL}", "not sharded, fp32": "", "not sharded, bf16": "--bf16"}


@pytest.mark.supports(
    "another `--lr` on resume, with `--override-opt_param-scheduler`", "momentum bit for bit, weights by the new rate"
)
@pytest.mark.parametrize("flags", SHARDINGS.values(), ids=SHARDINGS)
def test_another_learning_rate_on_resume_is_taken_if_asked_for(text: Path, tmp_path: Path, flags: str) -> None:
    run = f"--optimizer lion {flags} {HORIZON} --lr-decay-style constant --min-lr 0 --train-iters 3 --save-interval 1"
    pretrain(text, run, f"--save {tmp_path}/old")
    (tmp_path / "old" / LATEST).write_text("2")
    new = f"--load {tmp_path}/old --save {tmp_path}/new --lr 5e-5"
    refused = pretrain(text, run, new, kill_at=3)
    assert refused.returncode not in (0, -9)
    assert "this run changes --lr 0.0001 to 5e-05: add --override-opt_param-scheduler" in refused.output
    taken = pretrain(text, run, new, "--override-opt_param-scheduler")
    assert "learning rate: 5.000000E-05" in taken.output
    start, old, new = (read_checkpoint(tmp_path / where, at) for where, at in (("old", 2), ("old", 3), ("new", 3)))
    momenta = [key for key in start if "exp_avg" in key]
    assert momenta
    assert all(torch.equal(old[key], new[key]) and not torch.equal(start[key], new[key]) for key in momenta)
    norm = next(key for key in start if "final_layernorm.weight" in key and not key.startswith("optimizer"))
    by = [(other[norm].double() - start[norm].double()).abs().max().item() for other in (old, new)]
    if "--bf16" not in flags:  # near 1, bf16 has no such small steps
        assert by == pytest.approx([1e-4, 5e-5], rel=1e-2)


def test_the_checkpoints_schedule_is_taken_if_asked_for(text: Path, tmp_path: Path) -> None:
    run = f"--optimizer lion {DISTRIBUTED} {HORIZON} --lr-decay-style constant --train-iters 4"
    pretrain(text, run, f"--save {tmp_path} --save-interval 2 --exit-interval 2")
    taken = f"--load {tmp_path} --use-checkpoint-opt_param-scheduler"
    other_decay = pretrain(text, run, taken, "--weight-decay 5", kill_at=3)
    assert other_decay.returncode not in (0, -9)
    assert "this run changes --weight-decay 0.1 to 5.0, which Megatron would use for its first" in other_decay.output
    resumed = pretrain(text, run, taken, "--lr 5e-5", kill_at=4)
    if installed_traits().groups_are_found_by_rates:
        assert resumed.returncode not in (0, -9)
        assert "resume with the --lr, --min-lr" in resumed.output
    else:
        assert "learning rate: 1.000000E-04" in resumed.output


CONSTANT = {
    "lr": 1e-4, "min_lr": 0.0, "weight_decay": 0.1, "weight_decay_incr_style": "constant", "start_weight_decay": 0.1,
    "end_weight_decay": 0.1, "train_iters": 8, "override_opt_param_scheduler": False,
}  # fmt: skip
LINEAR = {**CONSTANT, "weight_decay_incr_style": "linear", "end_weight_decay": 0.2}


@pytest.mark.parametrize(
    ("saved", "change", "expected"),
    [
        (CONSTANT, {}, None),
        (CONSTANT, {"train_iters": 16}, None),
        (
            CONSTANT,
            {"weight_decay": 5.0, "start_weight_decay": 5.0, "end_weight_decay": 5.0},
            "weight-decay 0.1 to 5.0",
        ),
        (CONSTANT, {"weight_decay_incr_style": "cosine"}, "--weight-decay-incr-style constant to cosine"),
        (LINEAR, {"weight_decay": 5.0}, None),  # not used
        (LINEAR, {"end_weight_decay": 5.0}, "--end-weight-decay 0.2 to 5.0"),
        (LINEAR, {"train_iters": 16}, "--train-iters 8 to 16"),
    ],
)
@pytest.mark.parametrize("takes_checkpoints", [True, False])
def test_another_weight_decay_is_refused_unless_asked_for(
    saved: dict[str, Any], change: dict[str, Any], expected: str | None, takes_checkpoints: bool
) -> None:
    args = Namespace(**{**saved, **change, "use_checkpoint_opt_param_scheduler": takes_checkpoints})
    with pytest.raises(LionError, match=expected) if expected else contextlib.nullcontext():
        refuse_other_rates(Namespace(**saved), args)
    args.override_opt_param_scheduler = True
    refuse_other_rates(Namespace(**saved), args)


@pytest.mark.supports("another optimizer's checkpoint", "refused before it is read")
@pytest.mark.parametrize(("saved", "loaded"), [("adam", "lion"), ("sgd", "lion"), ("lion", "adam"), ("lion", "sgd")])
def test_another_optimizers_checkpoint_is_refused(text: Path, tmp_path: Path, saved: str, loaded: str) -> None:
    pretrain(text, f"--optimizer {saved} {DISTRIBUTED} {HORIZON} --train-iters 2 --save {tmp_path} --save-interval 2")
    run = pretrain(text, f"--optimizer {loaded} {DISTRIBUTED} {HORIZON} --train-iters 4 --load {tmp_path}", kill_at=4)
    assert run.returncode not in (0, -9), run.output[-3000:]
    assert not run.log.loss, "it trained on another optimizer's state"
    assert "--no-load-optim" in run.output


def test_the_weights_alone_of_an_adam_checkpoint_start_a_lion_run(text: Path, tmp_path: Path) -> None:
    pretrain(text, f"--optimizer adam {DISTRIBUTED} {HORIZON} --train-iters 2 --save {tmp_path} --save-interval 2")
    flags = f"--optimizer lion {DISTRIBUTED} {HORIZON} --train-iters 4 --load {tmp_path} --no-load-optim"
    run = pretrain(text, flags)
    assert sorted(run.log.loss) == [3, 4]


@pytest.mark.slow
def test_a_run_goes_on_from_a_non_persistent_checkpoint(text: Path, tmp_path: Path) -> None:
    run = f"--optimizer lion {DISTRIBUTED} --bf16 {HORIZON} --train-iters 8 --save-interval 8"
    passing = (
        "--non-persistent-save-interval 2 --non-persistent-ckpt-type global "
        f"--non-persistent-global-ckpt-dir {tmp_path}/passing --save {tmp_path}/cut --load {tmp_path}/cut"
    )
    whole = pretrain(text, run, f"--save {tmp_path}/whole", ranks=2)
    pretrain(text, run, passing, ranks=2, kill_at=5)
    assert not list(tmp_path.glob("cut/iter_*"))
    resumed = pretrain(text, run, passing, ranks=2)
    assert min(resumed.log.loss) == 5
    assert relative_difference(whole.log, resumed.log) == 0.0
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 8), read_checkpoint(tmp_path / "cut", 8))
