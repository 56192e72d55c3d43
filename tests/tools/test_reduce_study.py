"""The study of packed gradients: its ranks are simulated as real ones compute, and its table has the right numbers."""

import math
from pathlib import Path

import numpy
import pytest
import torch

from tests.harness import BATCH, CPU, HORIZON, MODEL, NO_DROPOUT, RATE, ROOT, read_checkpoint, run_ranks, text_flags
from tools.paper import reduce_study
from tools.paper.studies import rank_gpt, rank_training
from tools.paper.studies.reduce_arms import ARMS

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


@pytest.mark.parametrize("arm", ["fp32", "int4"])
def test_gradients_of_the_ranks_are_those_of_their_sequences(arm: str) -> None:
    """The gradient of rank 1 is that of a model which sees only its sequences, and the arms get their sum."""
    shape = rank_gpt.Shape(layers=1, hidden=16, length=8, vocabulary=32)
    generator = torch.Generator().manual_seed(1)
    bucket = rank_training.Bucket(shape, generator)
    tokens = torch.randint(32, (4, 2, 9), generator=generator)
    _, found = rank_gpt.gradients(shape, bucket.params, tokens)
    _, alone = rank_gpt.gradients(shape, bucket.params, tokens[1:2])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient[1], alone[name][0] / 4, rtol=1e-4, atol=1e-7)
    flat = torch.zeros(4, bucket.grad_data.numel())
    for name, view in bucket.views(flat).items():
        view.copy_(found[name])
    error = (ARMS[arm]()(bucket, list(flat)) - flat.sum(0)).norm() / flat.sum(0).norm()
    assert error == 0 if arm == "fp32" else 0 < error < 0.2


def test_ranks_with_the_same_gradient_vote_for_the_step_of_their_mean() -> None:
    """Which is clipped: unclipped gradients of early steps stay in the momentum for long."""
    vote, bucket, momentum = ARMS["vote"](), object(), torch.zeros(64)
    for step, norm in enumerate((30.0, 0.1, 2.0)):
        gradient = torch.randn(64, generator=torch.Generator().manual_seed(step))
        gradient *= norm / gradient.norm()
        clipped = gradient * min(1.0, 1.0 / norm)
        assert torch.equal(vote(bucket, [gradient / 4] * 4), 4 * torch.sign(0.9 * momentum + 0.1 * clipped))
        momentum = 0.95 * momentum + 0.05 * clipped


def test_a_study_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run has one record, made once, and the learning rate is the best of the uncompressed arm."""
    tokens = (numpy.arange(700) * 7 % 32).astype("uint16")  # can be learned, so that a learning rate is the best
    tokens[:600].tofile(tmp_path / "train_text_document.bin")
    tokens[600:].tofile(tmp_path / "valid_text_document.bin")
    monkeypatch.setitem(reduce_study.SHAPES, "tiny", rank_gpt.Shape(layers=1, hidden=16, length=8, vocabulary=32))
    monkeypatch.setattr(reduce_study, "TUNING_STEPS", 30)
    stage, path = reduce_study.Stage("tiny", 30, ("fp32", "ternary"), seeds=2), tmp_path / "records.jsonl"
    reduce_study.train(tmp_path, path, [reduce_study.Stage("tiny", 30, ("fp32",), seeds=1)])
    before = path.read_text()
    reduce_study.train(tmp_path, path, [stage])
    assert path.read_text().startswith(before)
    records = reduce_study.records(path)
    tuning = {record["lr"]: record["validation"] for record in records if record["seed"] == 0}
    best = min(tuning, key=lambda lr: tuning[lr])
    assert len(records) == len(tuning) + 4 and min(tuning) < best < max(tuning)
    assert {record["lr"] for record in records if record["seed"] > 0} == {best}
    assert all(0 < r["unlike"] < 0.5 and r["residual"] > 0.1 for r in records if r["arm"] == "ternary")


def test_the_table_has_the_interval_of_the_paired_differences() -> None:
    losses = {"fp32": [2.0, 4.0, 5.0], "int4": [2.002, 4.0, 5.0], "1bit": [2.2, 4.0]}
    mean, half = reduce_study.difference(losses["int4"], losses["fp32"])
    assert mean == pytest.approx(0.001 / 3)
    assert half == pytest.approx(4.30265 * 0.001 / math.sqrt(3) / math.sqrt(3))
    records = [
        {"arm": arm, "seed": seed, "validation": loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values, start=1)
    ]
    rows = list(reduce_study.table(records, reduce_study.Stage("tiny", 300, tuple(losses), seeds=3), margin=0.005))
    assert rows[3] == "| int4 | 3 of 3 | 3.6673 | +0.03% | -0.11% .. +0.18% |  |  | equal within 0.5% |"
    assert rows[4].startswith("| 1bit | 2 of 3 | 3.1000 | +5.00% |") and rows[4].endswith("| not finished |")


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.001, 0.004, "equal within 0.5%"),
        (0.001, 0.0041, "not shown: the interval exceeds 0.5%"),
        (0.02, 0.01, "worse by more than 0.5%"),
        (0.006, 0.003, "worse; more than 0.5% is not excluded"),
        (-0.006, 0.003, "better; more than 0.5% is not excluded"),
    ],
)
def test_verdicts(mean: float, half: float, said: str) -> None:
    assert reduce_study.verdict(mean, half, 0.005) == said
