"""A loop on ``megatron.core`` gets the same one-line errors about checkpoints as Megatron's own."""

from pathlib import Path

import pytest

from tests.harness import outcomes_of

SCRIPT = Path(__file__).with_name("core_checkpoints.py")
BIT_FOR_BIT = "bit for bit, on 2 gloo ranks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("core")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, str]:
    return outcomes_of(SCRIPT, str(folder), ranks=2)


@pytest.mark.supports("`megatron.core` / resume", BIT_FOR_BIT)
def test_a_run_resumes(outcomes: dict[str, str]) -> None:
    assert outcomes["resumed"] == "same weights"


@pytest.mark.supports("`megatron.core` / reshard", BIT_FOR_BIT)
@pytest.mark.usefixtures("outcomes")
def test_one_rank_resumes_what_two_saved(folder: Path) -> None:
    assert outcomes_of(SCRIPT, str(folder), "resume", ranks=1) == {"resumed": "same weights"}


@pytest.mark.parametrize(("case", "writer", "running"), [("into SGD", "lion", "sgd"), ("into Adam", "lion", "adam")])
@pytest.mark.refuses("`megatron.core` / refusals")
def test_lions_checkpoint_is_refused_by_another_optimizer(
    outcomes: dict[str, str], folder: Path, case: str, writer: str, running: str
) -> None:
    assert outcomes[case] == (
        f"LionError: the optimizer state in {folder}/iter_0000002 was written by {writer}, and this run's optimizer is "
        f"{running}. To continue with only the weights, load them without the optimizer's state. Nothing was changed"
    )


@pytest.mark.refuses("`megatron.core` / refusals")
def test_lion_refuses_adams_checkpoint(outcomes: dict[str, str]) -> None:
    assert outcomes["from Adam"].startswith("LionError: this optimizer state was not written by Lion")
    assert "\\n" not in outcomes["from Adam"]


@pytest.mark.refuses("`megatron.core` / refusals")
def test_a_damaged_file_is_named(outcomes: dict[str, str], folder: Path) -> None:
    said = (
        f"LionError: the checkpoint in {folder}/damaged/iter_0000002 cannot be read: {folder}/damaged/iter_0000002/__"
    )
    assert outcomes["damaged"].startswith(said)
    assert "is damaged or cut short at byte" in outcomes["damaged"]
    assert outcomes["damaged"].endswith("Nothing was changed")
