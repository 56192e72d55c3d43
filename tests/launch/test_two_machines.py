"""A recipe on two machines by the lines that launch.py prints: the losses of one machine, a cut link, killed ranks."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.launcher import commands
from megatron_lion.training_log import TrainingLog, read_training_log
from tests.harness import ROOT
from tests.launch.machines import ADDRESSES, INTERFACE, Machines
from tests.launch.test_launch_runs import finish, start

pytestmark = pytest.mark.slow
STEPS = (
    "train-iters=40", "save-interval=10", "eval-interval=40", "eval-iters=1", "lr-warmup-iters=5",
    "norm-ratio-interval=20", "norm-ratio-batches=2", "distributed-timeout-minutes=1", "seq-length=32",
    "num-workers=2",
)  # fmt: skip


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with contextlib.ExitStack() as stack:
        try:
            pair = stack.enter_context(Machines(tmp_path))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or error
            pytest.skip(f"no network namespaces here (they need root and iproute2): {str(reason).strip()}")
        yield pair


@pytest.fixture(scope="module")
def one_machine(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingLog:
    """The same recipe, all four ranks on this machine."""
    run = tmp_path_factory.mktemp("one") / "run"
    finish(start(text, run, "lion", *STEPS, "gpus-per-node=4"), timeout=500.0)
    return read_training_log(run / "log.txt")


def begin(machines: Machines, text: Path, run: Path, *overrides: str) -> None:
    """Start each machine's line of ``launch.py --print``."""
    cluster = yaml.safe_load((ROOT / "configs" / "clusters" / "cpu.yaml").read_text())
    cluster |= {"nodes": 2, "node-addresses": ",".join(ADDRESSES)}
    cluster["environment"] |= {"GLOO_SOCKET_IFNAME": INTERFACE, "PYTHONWARNINGS": "ignore"}
    own = run.parent / "two_machines.yaml"
    own.write_text(yaml.safe_dump(cluster))
    words = ["tiny_gpt", "lion", str(own), f"data={text}", f"run={run}", *STEPS, *overrides, "--print"]
    line = [sys.executable, str(ROOT / "launch" / "launch.py"), *words]
    printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [row for row in printed if row.startswith("#")] == ["# node 0 of 2", "# node 1 of 2"]
    for node in range(2):
        machines.start(node, printed[2 * node + 1])


def losses(machines: Machines) -> dict[int, float]:
    """By iteration; of those that were done again, the last."""
    log = TrainingLog()
    for line in machines.output().splitlines():
        log.add_line(line)
    return log.loss


def reached(iteration: int) -> str:
    return f"iteration {iteration:8d}/"


def test_two_machines_give_the_losses_of_one_also_over_a_link_that_was_cut_for_a_while(
    machines: Machines, one_machine: TrainingLog, text: Path, tmp_path: Path
) -> None:
    begin(machines, text, tmp_path / "run")
    machines.wait_for(reached(12), 400)
    machines.link("down")
    time.sleep(3.0)
    before = len(losses(machines))
    time.sleep(3.0)
    assert len(losses(machines)) == before < 40, "the link carries the gradients"
    machines.link("up")
    assert machines.wait(400) == [0, 0], machines.output()[-6000:]
    assert losses(machines) == one_machine.loss
    assert sorted(one_machine.loss) == list(range(1, 41))


def test_killed_ranks_are_started_again_on_both_machines_and_the_run_goes_on_from_its_checkpoint(
    machines: Machines, one_machine: TrainingLog, text: Path, tmp_path: Path
) -> None:
    begin(machines, text, tmp_path / "run", "max-restarts=2")
    machines.wait_for(reached(13), 400)
    machines.kill_ranks(1)
    assert machines.wait(500) == [0, 0], machines.output()[-6000:]
    assert re.search(r"loaded checkpoint .* at iteration (10|20)", machines.output())
    again = losses(machines)
    assert sorted(again) == list(range(1, 41))
    assert {step: again[step] for step in range(25, 41)} == {step: one_machine.loss[step] for step in range(25, 41)}


def test_a_link_that_stays_cut_ends_the_ranks_at_their_time_out_and_both_launchers(
    machines: Machines, text: Path, tmp_path: Path
) -> None:
    """Torchrun ends where the rendezvous store is; the other machine's is out of its reach, and is killed."""
    begin(machines, text, tmp_path / "run", "train-iters=4000", "lr-decay-iters=4000", "join-timeout=20")
    machines.wait_for(reached(12), 400)
    machines.link("down")
    assert machines.started[0].wait(200) == 1  # of which a minute is the time-out
    machines.wait_for_no_ranks(1, 60)
    limit = 20 + commands.START_SECONDS
    assert machines.started[1].wait(limit + 30) == -signal.SIGKILL
    first, second = (log.read_text(errors="replace") for log in machines.logs)
    for output in (first, second):
        assert "Timed out waiting 60000ms" in output
    assert f"torchrun has had no rank for {limit} s and does not end: killed" in second
    assert "does not end" not in first
