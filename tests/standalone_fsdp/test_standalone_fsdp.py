"""Plain Lion in the package ``megatron-fsdp`` 0.6.1, on a CPU; ``on_cpu.py`` names what is replaced there."""

import os
import re
from pathlib import Path

import pytest

from tests import wheels
from tests.harness import ROOT, Run, torchrun
from tests.megatron.test_frameworks import snippet

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
CASES = [
    *(f"{strategy}, {kernel}" for strategy in STRATEGIES for kernel in ("reference", "foreach", "fused")),
    "bf16 model",
    "bf16 momentum",
]


def run(script: str, *flags: str, ranks: int) -> Run:
    path = os.pathsep.join([str(ROOT), str(wheels.of_requirements(HERE / "requirements.txt"))])
    environment = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    finished = torchrun(*flags, ranks=ranks, script=HERE / script, environment=environment)
    assert finished.returncode == 0, finished.output[-6000:]
    return finished


def outcomes_of(*flags: str, ranks: int) -> dict[str, str]:
    return dict(re.findall(r"^CASE (.*): (.*)$", run("ranks.py", *flags, ranks=ranks).output, re.MULTILINE))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of("steps", ranks=2)


@pytest.mark.supports("`megatron-fsdp` with plain `Lion`", "2 ranks, each way to shard, each kernel, bit for bit")
@pytest.mark.parametrize("case", CASES)
def test_steps_have_the_bits_of_the_unsharded_run(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "same bits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    outcomes_of("save", str(folder), ranks=2)
    return folder


@pytest.mark.supports("`megatron-fsdp` with plain `Lion`: checkpoints", "2 ranks to 2 and to 1, bit for bit")
@pytest.mark.parametrize("ranks", [2, 1])
def test_a_checkpoint_of_two_ranks_resumes_on(ranks: int, folder: Path) -> None:
    assert outcomes_of("resume", str(folder), ranks=ranks) == {"next step": "same bits"}


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(snippet("torch FSDP2 and Megatron-FSDP"))
    finished = run("on_cpu.py", "script.py", ranks=2)
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\d\.\d{4})", finished.output)]  # lines may be mixed
    assert len(losses) == 8  # of two ranks
    assert min(losses[-2:]) < min(losses[:2])
    assert (tmp_path / "checkpoint" / ".metadata").exists()
