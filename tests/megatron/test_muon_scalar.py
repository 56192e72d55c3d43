"""Lion for what Muon does not update: its state, its line in the log, a resume bit for bit, and stock's checkpoints."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.compat.versions import TRAITS
from megatron_lion.integration.optimizer import muon_scalar
from tests.harness import HORIZON, assert_same_checkpoint, pretrain, pretrain_flags, read_checkpoint, torchrun
from tests.versions import since

pytestmark = [pytest.mark.slow, since("0.19")]

STOCK_GPT = Path(__file__).with_name("stock_gpt.py")
MUON = f"--optimizer muon --muon-scalar-optimizer lion --bf16 --train-iters 4 {HORIZON}"
LINE = "megatron-lion: lion on the 19 parameters that --optimizer muon does not update, betas (0.95, 0.98)"
# Ranks, and flags.
LAYOUTS = {
    "one rank": (1, ""),
    "state sharded over DP 2": (2, "--use-distributed-optimizer"),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
}


@pytest.fixture(autouse=True)
def muon() -> None:
    pytest.importorskip("emerging_optimizers", reason="Megatron's Muon")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.supports(
    "`--optimizer muon --muon-scalar-optimizer lion`",
    "this package's Lion on embeddings and 1-D parameters; bf16, one rank, DP 2 sharded and TP 2, resumed bit for bit",
)
def test_lion_next_to_muon_resumes_bit_for_bit(text: Path, tmp_path: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    whole = pretrain(text, MUON, flags, f"--save {tmp_path / 'whole'} --save-interval 2", ranks=ranks)
    assert [line for line in whole.ours() if "muon" in line] == [LINE]
    resumed = f"--load {tmp_path / 'whole'} --ckpt-step 2 --save {tmp_path / 'resumed'} --save-interval 2"
    assert min(pretrain(text, MUON, flags, resumed, ranks=ranks).log.loss) == 3
    last = read_checkpoint(tmp_path / "whole", 4)
    assert_same_checkpoint(last, read_checkpoint(tmp_path / "resumed", 4))
    momenta = {key: tensor for key, tensor in last.items() if ".exp_avg." in key}
    assert any("embedding" in key for key in momenta) and all(tensor.any() for tensor in momenta.values())
    assert not any(".exp_avg_sq." in key for key in last)


def test_stocks_checkpoint_is_continued(text: Path, tmp_path: Path) -> None:
    saving = f"--save {tmp_path / 'stock'} --save-interval 4"
    stock = torchrun(*pretrain_flags(text), MUON, saving, script=STOCK_GPT)
    assert stock.returncode == 0, stock.output[-6000:]
    assert stock.ours() == []
    # This run makes no step. Megatron saves at its end, because iteration 4 is not a multiple of the interval.
    pretrain(text, MUON, f"--load {tmp_path / 'stock'} --save {tmp_path / 'ours'} --save-interval 5")
    assert_same_checkpoint(*(read_checkpoint(tmp_path / name, 4) for name in ("stock", "ours")))


def test_the_other_scalar_optimizer_is_stocks(text: Path) -> None:
    run = pretrain(text, "--optimizer muon --muon-scalar-optimizer adam --train-iters 2")
    assert sorted(run.log.loss) == [1, 2]
    assert not [line for line in run.ours() if "muon" in line]


@pytest.mark.refuses("`--muon-scalar-optimizer lion` on 0.18, which builds Adam whatever the flag says")
def test_a_megatron_that_builds_adam_whatever_the_flag_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_traits", lambda: TRAITS["0.18"])
    with pytest.raises(LionError, match="ignores --muon-scalar-optimizer lion: what --optimizer muon does not"):
        muon_scalar.lion_for_the_rest(SimpleNamespace(optimizer="muon"))
