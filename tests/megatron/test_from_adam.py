"""Lion goes on from an Adam checkpoint: its weights, its momentum or none, its iteration and place in the schedule."""

import math
import re
from pathlib import Path

import pytest

from tests.harness import read_checkpoint
from tests.megatron import optimizer_state, reshard
from tests.megatron.reshard import LOAD_ALONE, SAVE_ALONE, SAVED_AT

ADAM = "--optimizer adam --lr 6e-4 --min-lr 6e-5"
# The harness's --lr 1e-4 --min-lr 1e-5, cosine over 20 iterations.
LION = "--override-opt_param-scheduler"
CASES = [
    ("DP 2", "TP 2", "fully_reshardable", "bf16 weights", "adam"),
    pytest.param("DP 2", "DP 1", "dp_reshardable", "fp32", "fresh", marks=pytest.mark.slow),
    pytest.param("DP 2", "DP 1", "torch", "fp32", "adam", marks=pytest.mark.slow),
    pytest.param("DP 2", "DP 4", "torch", "bf16 weights", "fresh", marks=pytest.mark.slow),
    pytest.param("PP 2", "PP 2 x DP 2", "dp_reshardable", "int8 momentum, remainders", "adam", marks=pytest.mark.slow),
    pytest.param("TP 2 x DP 2", "PP 2", "fully_reshardable", "remainders", "fresh", marks=pytest.mark.slow),
]


SUPPORTED = pytest.mark.supports(
    "`--lion-init-from`: Lion continues an Adam run", "masters and, if requested, momentum are Adam's bit for bit"
)


def split(differing: list[str]) -> set[str]:
    """Of which kind the tensors are that differ."""
    return {name.split()[-1] for name in differing}


@SUPPORTED
@pytest.mark.parametrize(("layout", "other", "how", "storage", "momentum"), CASES)
def test_masters_are_kept_and_momentum_is_adams_or_zero(
    text: Path, tmp_path: Path, layout: str, other: str, how: str, storage: str, momentum: str
) -> None:
    bf16 = "bf16 weights" if storage != "fp32" else "fp32"
    adam = reshard.save(text, tmp_path / "adam", layout, bf16, how, ADAM, SAVE_ALONE)
    flags = (f"{LION} --lion-init-from {momentum}", LOAD_ALONE, reshard.same_format(how))
    cell = reshard.load(text, adam, tmp_path / "lion", other, storage, *flags)
    assert split(cell.different) == (set() if momentum == "adam" else {"exp_avg"})
    if momentum == "fresh":
        loaded = optimizer_state.read(tmp_path / "lion" / "state")
        assert all(not tensors["exp_avg"].any() for tensors in loaded.values())
    assert "continuing an Adam run" in cell.run.output
    assert min(cell.run.log.loss) == SAVED_AT + 1
    # Lion's rates, at the next step after those that Adam took.
    rate = float(re.search(r"learning rate: (\S+)", cell.run.output)[1])
    assert rate == pytest.approx(1e-5 + 9e-5 * (1 + math.cos(math.pi * (SAVED_AT + 1) / 20)) / 2, rel=1e-4)


@SUPPORTED
@pytest.mark.slow
def test_what_is_taken_is_what_stands_in_the_checkpoint(text: Path, tmp_path: Path) -> None:
    # Read without Megatron and without this package: tied embeddings on one stage, so names are those of the model.
    adam = reshard.save(text, tmp_path, "DP 2", "bf16 weights", "fully_reshardable", ADAM, SAVE_ALONE)
    stored = read_checkpoint(tmp_path, SAVED_AT)
    lion = reshard.load(
        text, adam, tmp_path / "lion", "DP 1", "bf16 weights", f"{LION} --lion-init-from adam", LOAD_ALONE
    )
    assert lion.different == []
    for key in ("param", "exp_avg"):
        ours = sorted(tensors[key].double().abs().sum().item() for tensors in adam.state.values())
        theirs = [tensor for name, tensor in stored.items() if name.startswith(f"optimizer.state.{key}.")]
        assert sum(ours) == pytest.approx(sum(tensor.double().abs().sum().item() for tensor in theirs), rel=1e-12)


@SUPPORTED
def test_the_flag_left_in_place_does_not_touch_lions_own_checkpoints(text: Path, tmp_path: Path) -> None:
    adam = reshard.save(text, tmp_path / "adam", "DP 1", "fp32", "dp_reshardable", ADAM, SAVE_ALONE)
    fresh = f"{LION} --lion-init-from fresh"
    flags = (f"{fresh} --load {adam.folder} --save-interval 4 --exit-interval 4",)
    lion = reshard.save(text, tmp_path / "lion", "DP 1", "fp32", "dp_reshardable", *flags, at=4)
    again = reshard.load(text, lion, tmp_path / "again", "DP 1", "fp32", f"{fresh} --exit-interval 5")
    assert again.different == []
    assert "continuing an Adam run" not in again.run.output


def test_without_the_flag_adams_state_is_refused_with_it(text: Path, tmp_path: Path) -> None:
    adam = reshard.save(text, tmp_path / "adam", "DP 1", "fp32", "dp_reshardable", ADAM, SAVE_ALONE)
    run = reshard.probe(text, "load", tmp_path / "lion", "DP 1", "fp32", f"--load {adam.folder}")
    assert run.returncode != 0
    assert "--lion-init-from adam continues" in run.output
    assert not run.log.loss
