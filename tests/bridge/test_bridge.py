"""Megatron-Bridge 0.6.2 end to end on CPU ranks; ``stand_ins.py`` names what is stood in for."""

import re
from pathlib import Path

import pytest

from megatron_lion.config import LionError
from tests.bridge import environment
from tests.harness import Run, records
from tests.megatron.test_frameworks import snippet

pytestmark = pytest.mark.slow
COMPACT = f"--config-file {environment.HERE}/compact.yaml optimizer.lion_beta2=0.98"
# Bridge makes the optimizer's configuration of a checkpoint again, but for its timers, which it cannot make.
FROM_THE_CHECKPOINT = """
import yaml
from megatron.bridge.utils.instantiate_utils import instantiate

with open("checkpoints/iter_0000004/run_config.yaml") as file:
    config.optimizer = instantiate(yaml.safe_load(file)["optimizer"] | {"timers": None})
"""
LOSS = re.compile(r"iteration +(\d+)/.*lm loss: ([\d.E+-]+)")


def losses(run: Run) -> dict[int, str]:
    return {int(match[1]): match[2] for match in map(LOSS.search, run.output.splitlines()) if match}


def passed(run: Run) -> Run:
    assert run.returncode == 0, run.output[-6000:]
    return run


def refusal(run: Run) -> str:
    """The last line of the first rank's error."""
    assert run.returncode != 0
    name = f"{LionError.__module__}.{LionError.__qualname__}: "
    return next(line.partition(name)[2] for line in run.output.splitlines() if name in line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bridge")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    """Eight iterations on two ranks, saved after 4 and 8, with rounds."""
    flags = f"--iterations 8 --save {folder}/checkpoints --rounds {folder}/norm_ratio.jsonl"
    return passed(environment.run("pretrain.py", flags, COMPACT))


@pytest.mark.supports("Megatron-Bridge / options", "2 gloo ranks, with stand-ins")
@pytest.mark.supports("Megatron-Bridge / start-up line", "2 gloo ranks, with stand-ins")
def test_the_options_reach_lion(whole: Run, folder: Path) -> None:
    first = whole.ours()[0]
    assert first.startswith("megatron-lion: lion on 28 of 28 parameters")
    assert "betas (0.9, 0.98)" in first
    assert "bf16 momentum" in first
    assert "16 bits for each bf16 parameter" in first
    saved = (folder / "checkpoints" / "iter_0000004" / "run_config.yaml").read_text()
    assert "lion_momentum_dtype: bf16" in saved
    assert "lion_beta2: 0.98" in saved
    assert "misspelled: Failed to parse Hydra overrides" in whole.output
    assert "lion_momentum_dtyp" in whole.output


@pytest.mark.supports("Megatron-Bridge / telemetry", "2 gloo ranks, with stand-ins")
@pytest.mark.supports("Megatron-Bridge / rounds", "2 gloo ranks, with stand-ins")
def test_a_callback_reports_steps_and_rounds(whole: Run, folder: Path) -> None:
    steps = [line.split()[2] for line in whole.ours() if re.match(r"megatron-lion: step \d: gradient l1 ", line)]
    assert steps == [f"{number}:" for number in range(1, 9)]
    assert [record["iteration"] for record in records(folder)] == [2, 4, 6, 8]


@pytest.mark.supports("Megatron-Bridge / resume", "2 gloo ranks, with stand-ins: the same losses")
def test_a_run_resumes_with_the_same_losses(whole: Run, folder: Path) -> None:
    resumed = passed(environment.run("pretrain.py", f"--iterations 8 --load {folder}/checkpoints --step 4", COMPACT))
    found = losses(resumed)
    assert sorted(found) == [5, 6, 7, 8]
    assert found == {iteration: losses(whole)[iteration] for iteration in found}


@pytest.mark.supports("Megatron-Bridge / reshard", "2 gloo ranks to 1, with stand-ins: the losses to 1e-3")
def test_one_rank_resumes_what_two_saved(whole: Run, folder: Path) -> None:
    load = f"--iterations 6 --load {folder}/checkpoints --step 4"
    resumed = passed(environment.run("pretrain.py", load, COMPACT, ranks=1))
    expected = losses(whole)
    for iteration, loss in losses(resumed).items():
        assert float(loss) == pytest.approx(float(expected[iteration]), rel=1e-3)


@pytest.mark.refuses("Megatron-Bridge / refusals")
@pytest.mark.usefixtures("whole")
def test_another_optimizers_checkpoint_is_refused_in_one_line(folder: Path) -> None:
    run = environment.run("pretrain.py", f"--optimizer sgd --load {folder}/checkpoints --step 4")
    assert refusal(run).startswith(
        f"the optimizer state in {folder}/checkpoints/iter_0000004 was written by lion, and "
    )


@pytest.mark.refuses("Megatron-Bridge / refusals")
def test_what_lion_does_not_support_is_refused() -> None:
    run = environment.run("pretrain.py", "optimizer.optimizer_cuda_graph=true")
    assert refusal(run).startswith("--optimizer-cuda-graph is not supported with --optimizer lion")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """The page's script, which needs no registration, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("page")
    return run_text(snippet("Megatron-Bridge"), folder), folder


def run_text(text: str, folder: Path) -> Run:
    (folder / "script.py").write_text(text)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        return passed(environment.run("run_snippet.py", "script.py"))


@pytest.mark.supports("Megatron-Bridge, `LionOptimizerConfig` / options", "the page's script, 2 gloo ranks, stand-ins")
@pytest.mark.supports("Megatron-Bridge, `LionOptimizerConfig` / start-up line", "the page's script, 2 gloo ranks")
@pytest.mark.supports("Megatron-Bridge, `LionOptimizerConfig` / telemetry", "the page's script, 2 gloo ranks")
def test_the_script_of_the_page_needs_no_registration(page: tuple[Run, Path]) -> None:
    lines = page[0].ours()
    assert lines[0].startswith("megatron-lion: lion on 28 of 28 parameters")
    assert "bf16 momentum" in lines[0]
    assert sum("step" in line and "gradient l1" in line for line in lines) == 4


@pytest.mark.supports("Megatron-Bridge, `LionOptimizerConfig` / resume", "the page's script, 2 gloo ranks, stand-ins")
def test_the_script_of_the_page_resumes_with_the_options_of_its_checkpoint(page: tuple[Run, Path]) -> None:
    first, folder = page
    text = snippet("Megatron-Bridge").replace("train_iters=4", "train_iters=6")
    text = text.replace('save="checkpoints"', 'load="checkpoints"')
    # Bridge's schedule of the weight decay is as long as the run.
    text = text.replace("end_weight_decay=1.0)", "end_weight_decay=1.0, override_opt_param_scheduler=True)")
    resumed = run_text(text.replace("\nif __name__", f"{FROM_THE_CHECKPOINT}\nif __name__"), folder)
    assert sorted(losses(resumed)) == [5, 6]
    assert resumed.ours()[0] == first.ours()[0]
