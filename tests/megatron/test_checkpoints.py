"""A checkpoint's optimizer state is loaded only by the optimizer that wrote it."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lion.config import LionError
from megatron_lion.integration.checkpoint import ownership

pytest.importorskip("megatron.core", reason="compat names Megatron's modules")


def arguments(optimizer: str, **others: Any) -> SimpleNamespace:
    """The arguments that the check reads."""
    same = {"lr": 1e-4, "min_lr": 1e-5, "weight_decay": 0.1, "weight_decay_incr_style": "constant"}
    flags = dict.fromkeys(
        ("finetune", "no_load_optim", "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"), False
    )
    return SimpleNamespace(**{"optimizer": optimizer, "lion_init_from": None, **same, **flags, **others})


def ours() -> SimpleNamespace:
    """The arguments that one of our runs saves."""
    args = arguments("lion")
    ownership.mark(args)
    return args


def judge(saved: SimpleNamespace, running: SimpleNamespace, *found: str) -> None:
    ownership.refuse_another_optimizers_state("runs/x", saved, running, frozenset(found))


def test_stock_megatrons_lion_is_told_from_ours() -> None:
    with pytest.raises(LionError, match=r"written by stock Megatron's lion.*--no-load-optim"):
        judge(arguments("lion"), ours())
    judge(ours(), ours())


@pytest.mark.parametrize(("saved", "running"), [("adam", "lion"), ("lion", "adam"), ("muon", "lion")])
def test_a_mix_up_with_lion_is_refused_unless_only_the_weights_are_loaded(saved: str, running: str) -> None:
    with pytest.raises(LionError, match=f"written by .*{saved}.*, and this run's optimizer is {running}"):
        judge(arguments(saved), arguments(running))
    for weights_alone in ({"no_load_optim": True}, {"finetune": True}):
        judge(arguments(saved), arguments(running, **weights_alone))
    judge(arguments(saved, no_save_optim=True), arguments(running))


def test_pairs_without_lion_are_left_to_megatron() -> None:
    judge(arguments("sgd"), arguments("adam"))


ADAMS, LIONS = ("exp_avg", "exp_avg_sq"), ("exp_avg",)


def test_the_tensors_are_believed_before_the_arguments() -> None:
    with pytest.raises(LionError, match="written by adam, and this run's optimizer is lion"):
        judge(ours(), ours(), *ADAMS)
    with pytest.raises(LionError, match="written by lion, and this run's optimizer is adam"):
        judge(arguments("adam"), arguments("adam"), *LIONS)
    with pytest.raises(LionError, match="written by sgd, and this run's optimizer is lion"):
        judge(ours(), ours(), "momentum_buffer")
    judge(arguments("adam"), ours(), *LIONS)
    judge(ours(), ours(), *LIONS)
    judge(arguments("adam"), arguments("adam"), *ADAMS)
    judge(arguments("muon"), arguments("muon"), *LIONS)


def test_an_adam_checkpoint_is_refused_with_the_flag_that_continues_it_and_taken_with_it() -> None:
    with pytest.raises(LionError, match=r"--lion-init-from adam continues.*--lion-init-from fresh.*--no-load-optim"):
        judge(arguments("adam"), arguments("lion"), *ADAMS)
    judge(arguments("adam"), arguments("lion", lion_init_from="adam"), *ADAMS)
    with pytest.raises(LionError, match="written by sgd"):
        judge(arguments("sgd"), arguments("lion", lion_init_from="adam"), "momentum_buffer")


def test_lion_does_not_go_on_at_adams_rates_unasked() -> None:
    another = arguments("adam", lr=6e-4)
    with pytest.raises(LionError, match=r"--lr 0\.0006 to 0\.0001: add --override-opt_param-scheduler"):
        judge(another, arguments("lion", lion_init_from="fresh"), *ADAMS)
    judge(another, arguments("lion", lion_init_from="fresh", override_opt_param_scheduler=True), *ADAMS)
    with pytest.raises(LionError, match="would train Lion at Adam's learning rates"):
        judge(another, arguments("lion", lion_init_from="fresh", use_checkpoint_opt_param_scheduler=True), *ADAMS)
