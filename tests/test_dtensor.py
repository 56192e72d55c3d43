"""Lion on DTensor parameters, as torch FSDP2 and Megatron-FSDP have them: no rank changes a bit."""

from pathlib import Path

import pytest

from tests.dtensor_ranks import CASES
from tests.harness import outcomes_of

SCRIPT = Path(__file__).with_name("dtensor_ranks.py")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(SCRIPT, "steps", ranks=2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.supports("torch FSDP2 with plain `Lion` (DTensor parameters)", "2 ranks, each kernel, bit for bit")
def test_a_step_on_shards_has_the_bits_of_the_unsharded_step(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "same bits"


def test_a_gradient_with_a_pending_sum_is_summed_first(outcomes: dict[str, str]) -> None:
    assert outcomes["pending sum"] == "[1.0, 1.0]"


@pytest.mark.refuses("int8 momentum with DTensor parameters")
def test_int8_momentum_is_refused(outcomes: dict[str, str]) -> None:
    assert outcomes["int8"].startswith("momentum_dtype 'int8' does not support DTensor parameters, got one of shape (")
    assert outcomes["int8"].endswith("Use momentum_dtype='bf16' or 'fp32'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    outcomes_of(SCRIPT, "save", str(folder), ranks=2)
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.supports("torch FSDP2 with plain `Lion`: checkpoints", "2 ranks to 2 and to 3, bit for bit")
def test_a_checkpoint_of_two_ranks_resumes_on(ranks: int, folder: Path) -> None:
    assert outcomes_of(SCRIPT, "resume", str(folder), ranks=ranks) == {"loaded": "same bits", "next step": "same bits"}
