"""A checkpoint's optimizer state is loaded only by the optimizer that wrote it."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lion.config import LionError
from megatron_lion.integration import checkpoints

pytest.importorskip("megatron.core", reason="compat names Megatron's modules")


def arguments(optimizer: str, **others: Any) -> SimpleNamespace:
    """The arguments that the check reads."""
    return SimpleNamespace(**{"optimizer": optimizer, "finetune": False, "no_load_optim": False, **others})


def ours() -> SimpleNamespace:
    """The arguments that one of our runs saves."""
    args = arguments("lion")
    checkpoints.mark(args)
    return args


def test_stock_megatrons_lion_is_told_from_ours() -> None:
    with pytest.raises(LionError, match=r"written by stock Megatron's lion.*--no-load-optim"):
        checkpoints.refuse_another_optimizers_state("runs/x", arguments("lion"), ours())
    checkpoints.refuse_another_optimizers_state("runs/x", ours(), ours())


@pytest.mark.parametrize(("saved", "running"), [("adam", "lion"), ("lion", "adam"), ("muon", "lion")])
def test_a_mix_up_with_lion_is_refused_unless_only_the_weights_are_loaded(saved: str, running: str) -> None:
    with pytest.raises(LionError, match=f"written by {saved}, and this run's optimizer is {running}"):
        checkpoints.refuse_another_optimizers_state("runs/x", arguments(saved), arguments(running))
    for weights_alone in ({"no_load_optim": True}, {"finetune": True}):
        checkpoints.refuse_another_optimizers_state("runs/x", arguments(saved), arguments(running, **weights_alone))
    checkpoints.refuse_another_optimizers_state("runs/x", arguments(saved, no_save_optim=True), arguments(running))


def test_pairs_without_lion_are_left_to_megatron() -> None:
    checkpoints.refuse_another_optimizers_state("runs/x", arguments("sgd"), arguments("adam"))
