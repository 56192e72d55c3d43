"""Rehearsals with every Megatron release that has a training loop."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import versions
from tests.harness import CPU, PRETRAIN_GPT
from tests.rehearse.rehearsals import FLAGS, FOLDER, KINDS, LION

pytestmark = pytest.mark.slow
LAYOUT = "--tensor-model-parallel-size 2 --lion-momentum-dtype int8 --save nowhere --save-interval 1"


@pytest.fixture(scope="module", params=versions.others_with_a_loop())
def megatron(request: pytest.FixtureRequest) -> Iterator[versions.Megatron]:
    """A release that is not the environment's."""
    yield from versions.started(request.param)


def test_a_rehearsed_rank_has_the_bytes_of_a_real_one(megatron: versions.Megatron, tmp_path: Path) -> None:
    environment = {"SIZES": str(tmp_path)}
    flags = (FLAGS, LION, LAYOUT.replace("nowhere", str(tmp_path / "saved")))
    real = megatron.run(*flags, CPU, ranks=2, script=FOLDER / "real_rank.py", environment=environment)
    assert real.returncode == 0, real.output[-6000:]
    held = json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))
    line = f"0 2 0 {PRETRAIN_GPT}"
    run = megatron.run(line, *flags, script=FOLDER / "rehearsed_ranks.py", environment=environment)
    assert run.returncode == 0, run.output[-6000:]
    report = json.loads((tmp_path / "rehearsed-0.json").read_text(encoding="utf-8"))
    assert {kind: report["sizes"][kind] for kind in KINDS} == held
    assert report["checkpoint"]["state_of_stage"] > 0


def test_a_step_runs_with_experts_and_pipeline_stages(megatron: versions.Megatron, tmp_path: Path) -> None:
    experts = (
        "--disable-bias-linear --num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
    )
    parallel = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
    line = f"7 8 1 {PRETRAIN_GPT}"
    environment = {"SIZES": str(tmp_path)}
    script = FOLDER / "rehearsed_ranks.py"
    run = megatron.run(line, FLAGS, LION, experts, parallel, script=script, environment=environment)
    assert run.returncode == 0, run.output[-6000:]
    report = json.loads((tmp_path / "rehearsed-7.json").read_text(encoding="utf-8"))
    assert report["steps"]["steps"] == 1
