"""The estimate of weights, gradients and optimizer state against the bytes that real ranks hold."""

import json
from pathlib import Path

import pytest

from launch.launcher import commands, estimates
from tests.harness import run_ranks
from tests.launch.recipe_cases import recipe

PROBE = Path(__file__).with_name("memory_probe.py")


def measured(
    text: Path, folder: Path, *overrides: str, optimizer: str, dp: int, nodes: int = 1
) -> tuple[dict[str, int], estimates.Memory]:
    """The bytes on the fullest rank, and the estimate, for tiny_gpt on the cpu cluster."""
    cluster = (f"nodes={nodes}", f"gpus-per-node={dp // nodes}")
    found = recipe("tiny_gpt", optimizer, "cpu", *cluster, f"data={text}", "vocab-size=512", *overrides)
    flags = [*commands.training_flags(found, ["--no-check-for-nan-in-loss-and-grad"])]
    folder.mkdir()
    environment = {"PROBE_OUTPUT": str(folder), "PROBE_NODE": str(dp // nodes)}
    run = run_ranks(" ".join(flags), ranks=dp, script=PROBE, environment=environment)
    assert run.returncode == 0, run.output[-4000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(dp)]
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}, estimates.memory(found)


CASES = [
    *(("lion", dp, overrides) for dp in (1, 2, 4) for overrides in ([], ["bf16=true"])),
    *(("adamw", dp, ["bf16=true"]) for dp in (1, 2, 4)),
    ("sgd", 2, ["bf16=true"]),
    ("sgd_paper_no_momentum", 2, ["bf16=true"]),
    ("lion", 2, ["bf16=true", "use-distributed-optimizer=false"]),
    ("lion", 2, ["bf16=true", "lion-momentum-dtype=int8", "lion-master-weights=remainder", "grad-reduce-in-bf16=true"]),
]
# The rest goes to tests/full.sh.
IN_CI = (("lion", 4, ["bf16=true"]), CASES[-1])


@pytest.mark.parametrize(
    ("optimizer", "dp", "overrides"),
    [pytest.param(*case, marks=[] if case in IN_CI else [pytest.mark.slow]) for case in CASES],
)
def test_the_estimate_is_within_a_tenth_of_what_ranks_hold(
    text: Path, tmp_path: Path, optimizer: str, dp: int, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found, needed = measured(text, tmp_path / "probe", f"run={tmp_path}/run", *overrides, optimizer=optimizer, dp=dp)
    pairs = {key: (getattr(needed, key), found[key]) for key in found}
    row = ", ".join(f"{key} {estimate:,} / {there:,}" for key, (estimate, there) in pairs.items())
    with capsys.disabled():
        print(f"\n{optimizer} DP {dp} {' '.join(overrides)}: estimated / measured bytes: {row}")
    for estimate, there in pairs.values():
        assert estimate == pytest.approx(there, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feedback", "dp", "nodes"), [("int8", 2, 1), ("bf16", 2, 1), ("none", 2, 1), ("int8", 4, 1), ("int8", 4, 2)]
)
def test_the_estimate_of_residuals_is_what_ranks_hold(
    text: Path, tmp_path: Path, feedback: str, dp: int, nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """To 1 %, which is more than the padding of the buckets. On two nodes of two ranks it is a third of one of four."""
    overrides = (f"run={tmp_path}/run", "bf16=true", "lion-reduce=int4", f"lion-error-feedback={feedback}")
    found, needed = measured(text, tmp_path / "probe", *overrides, optimizer="lion", dp=dp, nodes=nodes)
    with capsys.disabled():
        print(f"\n{feedback} DP {dp} on {nodes}: estimated / measured {needed.residual:,} / {found['residual']:,}")
    assert found["residual"] == pytest.approx(needed.residual, rel=0.01)
    assert (found["residual"] > 0) == (feedback != "none")
