"""The scripts of docs/frameworks.md run, and ``Reports`` gives a loop on megatron.core what Megatron's loop has."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lion import LionError, NormRatioOptions, Reports
from megatron_lion.config import LionOptions
from tests.harness import ROOT, Run, records, run_ranks

PAGE = ROOT / "docs" / "frameworks.md"
ON_TWO_RANKS = "the script of the page, on 2 gloo ranks"


def snippet(heading: str) -> str:
    """The script below a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    found = re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def run_core_script(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    script = folder / "script.py"
    script.write_text(text)
    monkeypatch.chdir(folder)  # where the script leaves its records
    run = run_ranks(ranks=2, script=script)
    assert run.returncode == 0, run.output[-6000:]
    return run


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("core")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_core_script(folder, snippet("megatron.core"), monkeypatch), folder


@pytest.mark.supports("`megatron.core` / options", ON_TWO_RANKS)
@pytest.mark.supports("`megatron.core` / start-up line", ON_TWO_RANKS)
def test_the_script_for_megatron_core_trains_every_parameter(told: tuple[Run, Path]) -> None:
    first = told[0].ours()[0]
    assert first.startswith("megatron-lion: lion on 29 of 29 parameters")
    assert "betas (0.9, 0.98)" in first
    assert "state sharded over DP=2" in first


@pytest.mark.supports("`megatron.core` / telemetry", ON_TWO_RANKS)
@pytest.mark.supports("`megatron.core` / rounds", ON_TWO_RANKS)
def test_reports_measure_steps_and_rounds(told: tuple[Run, Path]) -> None:
    run, folder = told
    steps = [line for line in run.ours() if re.match(r"megatron-lion: step \d: gradient l1 ", line)]
    assert [line.split()[2] for line in steps] == ["1:", "2:", "3:", "4:"]
    rounds = records(folder)
    assert [record["iteration"] for record in rounds] == [2, 4]
    (elements,) = {int(re.search(r"\((\d+) elements\)", line)[1]) for line in steps}  # type: ignore[index]
    assert {record["d"] for record in rounds} == {elements}
    assert all(4.0 < record["loss"] < 6.0 for record in rounds), "about log(128)"
    assert sum("norm ratio at iteration" in line for line in run.ours()) == 2


def test_reports_change_nothing_in_training(
    told: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = re.sub(r"^reports = .*$", "", snippet("megatron.core"), flags=re.MULTILINE)
    silent = run_core_script(tmp_path, text.replace("reports.after_step(iteration)", "pass"), monkeypatch)
    losses = [
        sorted(line for line in run.output.splitlines() if line.startswith("iteration ")) for run in (told[0], silent)
    ]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


def test_reports_say_what_they_need() -> None:
    with pytest.raises(LionError, match="telemetry_interval needs Megatron's optimizer around Lion, got object"):
        Reports(object(), object(), telemetry_interval=1)
    with pytest.raises(LionError, match=r"telemetry_interval must be >= 0 steps .*, got '10'"):
        Reports(object(), object(), telemetry_interval="10")  # type: ignore[arg-type]
    part = SimpleNamespace(options=LionOptions(), config=SimpleNamespace(optimizer_cpu_offload=True))
    with pytest.raises(LionError, match="telemetry_interval does not see the steps of optimizer_cpu_offload"):
        Reports(object(), part, telemetry_interval=1)
    with pytest.raises(LionError, match=r"norm_ratio must be megatron_lion.NormRatioOptions or None, got 100"):
        Reports(object(), object(), norm_ratio=100)  # type: ignore[arg-type]
    rounds = NormRatioOptions(interval=1)
    with pytest.raises(LionError, match=r"rounds need run_batch, a function .*, got None"):
        Reports(object(), object(), norm_ratio=rounds)
    with pytest.raises(LionError, match="which object does not have: pass the model as DistributedDataParallel"):
        Reports(object(), object(), norm_ratio=rounds, run_batch=lambda iteration, index: None)
