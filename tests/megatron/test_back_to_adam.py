"""A Lion checkpoint continues with Adam: with this package, and with stock Megatron after an uninstall."""

from pathlib import Path

import pytest
import torch

from tests.harness import NO_DROPOUT, pretrain, pretrain_flags, read_checkpoint, torchrun

STOCK_GPT = Path(__file__).with_name("stock_gpt.py")
SHARDED = f"--bf16 --use-distributed-optimizer {NO_DROPOUT}"
SAVED_AT = 3
# Adam changes nothing at this learning rate, so the weights that it saves are those that it loaded.
ADAM = "--optimizer adam --lr 0 --min-lr 0 --save-interval 1"


@pytest.fixture(scope="module")
def lion(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Lion run that saved at iteration ``SAVED_AT``."""
    folder = tmp_path_factory.mktemp("lion")
    iterations = f"--train-iters {SAVED_AT} --save-interval {SAVED_AT}"
    pretrain(text, SHARDED, f"--optimizer lion {iterations} --save {folder}")
    return folder


def weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    return {key: value for key, value in read_checkpoint(folder, iteration).items() if key.startswith("decoder.")}


def assert_weights_are_lions(lion: Path, adam: Path, iteration: int) -> None:
    before, after = weights(lion, SAVED_AT), weights(adam, iteration)
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "first"),
    [
        ("--load {lion} --no-load-optim", SAVED_AT + 1),
        ("--load {lion} --finetune", 1),
        ("--pretrained-checkpoint {lion} --load {adam}", 1),
    ],
)
def test_adam_continues_from_lions_weights(text: Path, lion: Path, tmp_path: Path, flags: str, first: int) -> None:
    where = flags.format(lion=lion, adam=tmp_path)
    run = pretrain(text, SHARDED, ADAM, f"--train-iters {first} --save {tmp_path} {where}")
    assert min(run.log.loss) == first
    assert_weights_are_lions(lion, tmp_path, first)


@pytest.mark.slow
def test_stock_megatron_loads_lions_weights_and_refuses_its_state(text: Path, lion: Path, tmp_path: Path) -> None:
    more = f"{ADAM} --train-iters {SAVED_AT + 1} --save {tmp_path} --load {lion}"
    run = torchrun(*pretrain_flags(text), SHARDED, more, "--no-load-optim", script=STOCK_GPT)
    assert run.returncode == 0, run.output[-6000:]
    assert run.ours() == []
    assert min(run.log.loss) == SAVED_AT + 1
    assert_weights_are_lions(lion, tmp_path, SAVED_AT + 1)

    run = torchrun(*pretrain_flags(text), SHARDED, more, script=STOCK_GPT)
    assert run.returncode != 0
    assert "exp_avg_sq" in run.output
