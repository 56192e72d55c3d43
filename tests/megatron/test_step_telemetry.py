"""``--lion-telemetry`` inside Megatron: the same sums on every layout, Megatron's own norm, and an undisturbed run."""

import re
from pathlib import Path

import pytest

from tests.harness import HORIZON, NO_DROPOUT, Run, pretrain, records, relative_difference

LINE = re.compile(
    r"step (\d+): gradient l1 (\S+), l2 (\S+), zero signs (\S+)%, flipped (\S+)%, agreement (\S+), "
    r"max \|theta\| (\S+) \((\d+) elements\)"
)
COMMON = f"--optimizer lion {HORIZON} {NO_DROPOUT} --train-iters 4 --log-interval 2"


def steps(run: Run) -> dict[int, list[float]]:
    """Iteration to l1, l2, zeros, flipped, agreement, largest parameter, elements."""
    found = (LINE.search(line) for line in run.ours())
    return {int(match[1]): [float(number) for number in match.groups()[1:]] for match in found if match}


@pytest.fixture(scope="module")
def start(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that every layout starts from."""
    folder = tmp_path_factory.mktemp("start")
    pretrain(text, f"--optimizer lion {HORIZON} {NO_DROPOUT} --train-iters 2 --save {folder} --save-interval 2")
    return folder


@pytest.mark.supports(
    "`--lion-telemetry`: norms, signs and agreement of a step",
    "one process against DP 2, DP 2 unsharded, TP 2 x PP 2; training unchanged; Megatron's own norm",
)
@pytest.mark.supports("Megatron's loop / telemetry", "on gloo ranks")
def test_every_layout_counts_each_element_once_and_sums_the_same(text: Path, start: Path) -> None:
    load = f"{COMMON} --load {start} --no-load-optim --lion-telemetry"
    alone = steps(pretrain(text, load))
    assert sorted(alone) == [4], "iteration 3 is not logged"
    for ranks, flags in (
        (2, "--use-distributed-optimizer"),
        (2, ""),
        (4, "--use-distributed-optimizer --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    ):
        (found,) = steps(pretrain(text, load, flags, ranks=ranks)).values()
        (expected,) = alone.values()
        assert found[-1] == expected[-1]
        assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
        assert found[2:5] == pytest.approx(expected[2:5], abs=0.02)
        assert found[5] == pytest.approx(expected[5], rel=1e-4)


def test_training_is_the_same_and_the_norms_are_those_of_the_log(text: Path, tmp_path: Path) -> None:
    flags = f"{COMMON} --log-interval 1 --use-distributed-optimizer --clip-grad 0"
    without = pretrain(text, flags, ranks=2)
    rounds = f"--norm-ratio-at-start --norm-ratio-file {tmp_path}/r.jsonl"
    told = pretrain(text, flags, f"--lion-telemetry {rounds}", ranks=2)
    assert relative_difference(without.log, told.log) == 0.0
    found = steps(told)
    assert sorted(found) == [1, 2, 3, 4]
    assert {values[-1] for values in found.values()} == {records(tmp_path, "r.jsonl")[0]["d"]}
    norms = [float(number) for number in re.findall(r"grad norm: (\S+)", told.output)]
    assert [values[1] for values in found.values()] == pytest.approx(norms, rel=2e-3)  # the log has 3 decimals
    assert all(values[2] < 1.0 and values[4] > 0.5 for values in found.values())


def test_without_lion_it_is_refused(text: Path) -> None:
    run = pretrain(text, "--optimizer sgd --lion-telemetry --train-iters 2", kill_at=2)
    assert run.returncode not in (0, -9)
    assert "--lion-telemetry needs --optimizer lion, and this run has sgd" in run.output
