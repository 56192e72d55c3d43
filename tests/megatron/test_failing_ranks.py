"""A rank that fails ends, although the processes that it has started live through SIGTERM."""

from pathlib import Path

import pytest

from tests.harness import WORKERS, pretrain

SCRIPT = Path(__file__).with_name("failing.py")


@pytest.mark.parametrize("failure", ["RuntimeError", pytest.param("SystemExit", marks=pytest.mark.slow)])
def test_a_rank_that_fails_does_not_wait_for_its_data_workers(text: Path, failure: str) -> None:
    flags = f"--optimizer lion --train-iters 4 --exit-signal-handler {WORKERS}"
    run = pretrain(text, flags, script=SCRIPT, environment={"FAILURE": failure}, kill_at=99, timeout=60.0)
    assert run.returncode == 1, run.output[-3000:]
    assert ("failed on purpose" in run.output) == (failure == "RuntimeError")
    assert max(run.log.loss) == 2
    assert "DataLoader worker" not in run.output
