"""A checkpoint that is saved before the first step loads, in every format, with Lion and with SGD."""

from pathlib import Path

import pytest

from tests.harness import outcomes_of, run_ranks
from tests.megatron.first_save import CASES


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(Path(__file__).with_name("first_save.py"), ranks=2)


@pytest.mark.parametrize("case", CASES)
def test_a_save_before_the_first_step_loads_and_changes_nothing(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "same weights"


def test_a_configuration_builds_lion_without_registration() -> None:
    """The hook that Megatron-Bridge calls. The order of imports does not matter, and Megatron stays as it is."""
    run = run_ranks(ranks=2, script=Path(__file__).with_name("provide.py"))
    assert run.returncode == 0, run.output[-6000:]
    assert run.ours()[0].startswith("megatron-lion: lion on 29 of 29 parameters")
    assert "bf16 momentum" in run.ours()[0]
    assert "CASE loaded: same weights" in run.output
    assert "CASE a plain configuration has Lion's options: False" in run.output
    assert "CASE get_megatron_optimizer is wrapped: False" in run.output
    assert "CASE another optimizer: LionOptimizerConfig builds only lion, got optimizer='adam'" in run.output
