"""The study of packed gradients: its ranks are simulated as real ones compute, and its table has the right numbers."""

import math
from pathlib import Path

import pytest
import torch

from tests.harness import BATCH, CPU, HORIZON, MODEL, NO_DROPOUT, RATE, ROOT, read_checkpoint, run_ranks, text_flags
from tools.paper import reduce_study

SIMULATED = ROOT / "tools" / "paper" / "studies" / "simulated_ranks.py"
STEPS = 6
# No clip factor, which depends on the order of a sum over ranks.
RUN = f"--optimizer lion --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable {HORIZON} --clip-grad 0"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4", "ternary", "ternary-bf16", "int4-none"])
def test_simulated_ranks_train_the_weights_that_real_ranks_train(text: Path, tmp_path: Path, mode: str) -> None:
    """Four micro-batches on one rank, and one on each of four ranks, bit for bit. A save changes only the momentum."""
    common = (MODEL, BATCH, RATE, CPU, text_flags(text), RUN, NO_DROPOUT, f"--train-iters {STEPS} --save-interval 100")
    code, _, feedback = mode.partition("-")
    flags = f"--lion-reduce {code} --lion-error-feedback {feedback or 'int8'}"
    real = run_ranks(*common, flags, f"--save {tmp_path / 'real'}", ranks=4)
    simulated = run_ranks(mode, *common, f"--save {tmp_path / 'simulated'}", ranks=1, script=SIMULATED)
    stock = run_ranks("fp32", *common, f"--save {tmp_path / 'stock'}", ranks=1, script=SIMULATED)
    for run in (real, simulated, stock):
        assert run.returncode == 0, run.output[-6000:]
    weights = [
        {key: value for key, value in read_checkpoint(tmp_path / name, STEPS).items() if "optimizer" not in key}
        for name in ("real", "simulated", "stock")
    ]
    assert weights[0].keys() == weights[1].keys() and weights[0]
    assert not [key for key, value in weights[0].items() if not torch.equal(value, weights[1][key])]
    assert [key for key, value in weights[0].items() if not torch.equal(value, weights[2][key])], "nothing was packed"


def test_the_table_has_the_interval_of_the_paired_differences() -> None:
    losses = {"fp32": [2.0, 4.0, 5.0], "int4": [2.002, 4.0, 5.0], "1bit": [2.2, 4.0, 5.0]}
    mean, half = reduce_study.difference(losses["int4"], losses["fp32"])
    assert mean == pytest.approx(0.001 / 3)
    assert half == pytest.approx(4.30265 * 0.001 / math.sqrt(3) / math.sqrt(3))
    rows = reduce_study.table(losses, margin=0.005).splitlines()
    assert rows[3] == "| int4 | 3 | 3.6673 | +0.03% | -0.11% .. +0.18% | yes |"
    assert rows[4].endswith("| no |")
    assert reduce_study.table({"fp32": [2.0], "int4": [2.1]}, 0.005).endswith("| +5.00% | unknown | unknown |")
