"""``megatron-lion rehearse`` and ``launch.py --rehearse``: the reports of several ranks, and the exit status."""

import json
from pathlib import Path

import pytest

from megatron_lion import cli
from tests.harness import PRETRAIN_GPT, ROOT, run_ranks
from tests.rehearse.rehearsals import FLAGS, LION

COMMAND = Path(cli.__file__).with_name("__main__.py")
PP_2 = "--pipeline-model-parallel-size 2"


@pytest.mark.slow
def test_the_command_reports_the_first_and_the_last_stage(tmp_path: Path) -> None:
    reports = tmp_path / "reports.json"
    options = f"rehearse --world-size 64 --gpu-memory 1e-5 --json {reports} {PRETRAIN_GPT}"
    run = run_ranks(options, FLAGS, LION, PP_2, "--global-batch-size 64", script=COMMAND)
    assert run.returncode == 1, run.output[-3000:]
    assert "rehearsed 4 of 64 ranks (PP 2 x DP 32), lion. This is not training" in run.output
    assert run.output.rstrip().endswith("TOO LARGE")
    assert "parameters of rank 0 (" in run.output
    assert [report["rank"] for report in json.loads(reports.read_text())] == [0, 31, 32, 63]


@pytest.mark.slow
def test_a_rank_that_would_not_start_gives_status_2_and_its_message() -> None:
    options = f"rehearse --world-size 4 --rank 3 {PRETRAIN_GPT}"
    run = run_ranks(options, FLAGS, LION, PP_2, "--num-layers 3", script=COMMAND)
    assert run.returncode == 2
    assert "rank 3 of 4 would not start" in run.output
    assert "should be divisible by" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2_small", "bert_small"])
def test_a_recipe_is_rehearsed_beside_its_estimate(model: str) -> None:
    rates = "lr=1e-5 min-lr=0 weight-decay=0.1"  # which the recipes for BERT do not have
    run = run_ranks(model, f"lion a100x16 {rates} --rehearse", script=ROOT / "launch" / "launch.py")
    assert run.returncode == 0, run.output[-3000:]
    assert "rehearsed 2 of 16 ranks (DP 16), lion" in run.output
    (estimate,) = [line for line in run.output.splitlines() if line.startswith("the recipe's estimate")]
    differences = [float(part.split("%")[0]) for part in estimate.split("(")[1:]]
    assert len(differences) == 3
    assert max(map(abs, differences)) < 0.5
