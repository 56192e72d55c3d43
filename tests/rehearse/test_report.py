"""Which ranks are rehearsed, what the report says, and the exit status."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lion import cli
from megatron_lion.cli.rehearse import ranks, report
from megatron_lion.integration.rehearsal.one_rank import RankReport

GIB = 1 << 30
SENT = {"group": "tensor", "collective": "send", "ranks": 2, "messages": 3, "bytes": 4}
STEPS = {"steps": 1, "seconds": 0.1, "activations": GIB, "messages": [SENT]}


def rank_report(rank: int = 0, **changed: Any) -> RankReport:
    """A rank with 1 GiB each of weights, momentum and masters, and 2 GiB of gradients."""
    sizes = {"weights": GIB, "gradients": 2 * GIB, "momentum": GIB, "masters": GIB}
    made = RankReport(
        rank=rank,
        world_size=64,
        layout={"TP": 2, "PP": 4, "CP": 1, "EP": 1, "DP": 8},
        stages=[0, 16, 32, 48],
        replicas=list(range(0, 16, 2)),
        optimizer="lion",
        sizes={**sizes, "parameters": GIB // 2, "on_host": 0, "on_device": sum(sizes.values())},
        buckets=[{"group": "data parallel", "ranks": 8, "elements": 1000, "padding": 10}],
    )
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def test_distinct_ranks_are_the_first_and_the_last_shard_of_each_kind_of_stage() -> None:
    assert ranks.distinct(rank_report()) == [0, 14, 32, 46, 48, 62]
    assert ranks.distinct(rank_report(stages_alike=False)) == [0, 14, 16, 30, 32, 46, 48, 62]
    assert ranks.distinct(rank_report(stages=[0], replicas=[0])) == [0]


def test_chosen_ranks_are_rehearsed_once_and_all_ranks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.one_rank, "preload", lambda: None)
    monkeypatch.setattr(ranks, "_rehearse_one", lambda rank, options: rank)
    assert ranks.rehearse(SimpleNamespace(rank=[3, 1, 3], ranks=None, world_size=4)) == [3, 1]
    assert ranks.rehearse(SimpleNamespace(rank=None, ranks="all", world_size=4)) == [0, 1, 2, 3]


def test_a_rank_that_does_not_fit_is_named_and_the_status_is_1() -> None:
    larger = rank_report(48, sizes={**rank_report().sizes, "on_device": 6 * GIB})
    built = [rank_report(), larger]
    assert report.is_too_large(built, 5.5)
    assert not report.is_too_large(built, 6.0)
    assert not report.is_too_large(built, None)
    assert "rank 48 needs 6.00 GiB of 5.5 GiB" in report.text(built, {}, 5.5)
    assert report.text(built, {}, 5.5).endswith("TOO LARGE")


def test_activations_that_steps_measured_are_part_of_what_a_rank_needs() -> None:
    measured = rank_report(steps=STEPS)
    assert report.is_too_large([measured], 5.5)
    assert "no training" in report.text([measured], {}, 5.5)
    assert "  tensor, 2 ranks: 3 x send, 4 B" in report.text([measured], {}, 5.5)
    assert report.NO_ACTIVATIONS in report.text([rank_report()], {}, 5.5)


def test_the_estimate_is_compared_with_what_was_built() -> None:
    text = report.text([rank_report()], {"weights": GIB, "gradients": GIB, "state": 3 * GIB}, None)
    assert "weights 1.00 GiB (+0.00 %), gradients 1.00 GiB (-50.00 %), state 3.00 GiB (+50.00 %)" in text


def test_padding_is_counted_and_a_checkpoint_adds_up_the_stages() -> None:
    plan = {"whole": {"a": GIB, "b": GIB}, "state_of_stage": GIB, "files_of_rank": 2}
    text = report.text([rank_report(checkpoint=plan)], {}, None)
    assert "1 buckets of gradients, 1,000 elements, 10 of them padding (1.000 %)" in text
    assert "checkpoint: 6.00 GiB, up to 128 files of tensors" in text  # 2 whole tensors, 4 stages


def test_a_checkpoint_that_is_not_there_is_reported() -> None:
    loaded = {"folder": "/none", "iteration": 0, "tensors": 0, "converted": []}
    assert "--load /none: no checkpoint found here" in report.text([rank_report(loaded=loaded)], {}, None)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--world-size 0 a.py", "--world-size 0 must be at least 1"),
        ("--world-size 4 --rank 4 a.py", "--rank 4 is not a rank of --world-size 4: 0 to 3"),
        ("--world-size 4 --rank 0 --ranks distinct a.py", "--rank and --ranks are both set"),
        ("--world-size 4 --gpu-memory 0 a.py", "--gpu-memory 0 must be above 0"),
        ("--world-size 4 --steps -1 a.py", "--steps -1 must be at least 0"),
        (
            "--world-size 4 --json none/x.json a.py",
            "--json none/x.json: the folder none does not exist. Create it first",
        ),
        ("a.py --world-size 4", "--world-size is missing: set it before SCRIPT"),
        ("--world-size 4 none.py", "none.py is not a Python file"),
        ("--world-size 4 torchrun a.py", "torchrun is not a Python file"),
    ],
)
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], words: str, problem: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["rehearse", *words.split()])
    assert ended.value.code == 2
    assert f"megatron-lion: error: {problem}" in capsys.readouterr().err
