"""A recipe as a job of a real Slurm with two nodes, both on this machine: preemption, a requeue, a killed rank."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_lion.training_log import TrainingLog, read_training_log
from tests.harness import ROOT
from tests.launch.slurm_daemons import Slurm, missing
from tests.launch.test_launch_runs import finish, start

pytestmark = pytest.mark.slow
STEPS = (
    "train-iters=40", "save-interval=10", "eval-interval=40", "eval-iters=1", "lr-warmup-iters=5",
    "norm-ratio-interval=20", "norm-ratio-batches=2", "seq-length=32", "num-workers=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Slurm(tmp_path_factory.mktemp("slurm")))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"no network namespaces here (they need root and iproute2): {reason.strip()}")
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingLog:
    """The same recipe with two ranks, started here without Slurm."""
    run = tmp_path_factory.mktemp("here") / "run"
    finish(start(text, run, "lion", *STEPS, "gpus-per-node=2"), timeout=300.0)
    return read_training_log(run / "log.txt")


class Job:
    """A submitted recipe with two ranks and its run's folder."""

    def __init__(self, slurm: Slurm, text: Path, run: Path, *overrides: str) -> None:
        words = ["tiny_gpt", "lion", "cpu", f"data={text}", f"run={run}", *STEPS, *overrides]
        done = slurm.run(sys.executable, "launch/launch.py", *words, "--slurm")
        assert done.returncode == 0, done.stderr
        self.slurm, self.run, self.number = slurm, run, done.stdout.split()[-1]

    def log(self) -> str:
        path = self.run / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def went_on_from(self) -> int:
        """The iteration of the one checkpoint that was loaded."""
        found = set(re.findall(r"loaded checkpoint from .* at iteration (\d+)", self.log()))
        assert len(found) == 1, found
        return int(found.pop())

    def wait_for_iteration(self, iteration: int) -> None:
        self._wait(f"iteration {iteration}", lambda: f"iteration {iteration:8d}/" in self.log(), 120)

    def wait_for_end(self) -> str:
        """Its state then; 240 s hold two attempts."""
        self._wait("ended", lambda: self.slurm.state(self.number) not in ("PENDING", "RUNNING", "COMPLETING"), 240)
        return self.slurm.state(self.number)

    def _wait(self, what: str, holds: Callable[[], bool], seconds: float) -> None:
        try:
            self.slurm.wait_until(what, holds, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-6000:]}") from None


def preempt(job: Job) -> None:
    """A job of the partition that comes first wants all CPUs."""
    job.slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")


def requeue(job: Job) -> None:
    job.slurm.run("scontrol", "requeue", job.number)


def signal_steps(job: Job) -> None:
    """What --signal=TERM@600 does ten minutes before the time limit."""
    job.slurm.run("scancel", "--signal=TERM", job.number)


def as_resumed(log: TrainingLog, saved: int) -> dict[int, float]:
    """The losses that a run which went on from iteration ``saved`` logs.

    Megatron logs the first iteration after each start and does not begin its mean anew there (``training_log``,
    ``should_reset``): the second's line has the mean of both.
    """
    return log.loss | {saved + 2: pytest.approx((log.loss[saved + 1] + log.loss[saved + 2]) / 2, abs=2e-6)}


# Stands for Apptainer: notes its options, then runs the words after the image, here.
APPTAINER = """#!/bin/bash
printf '%s\\n' "$@" > {folder}/apptainer.$SLURM_NODEID
while [[ "$1" != */lion.sif ]]; do shift; done
shift
exec "$@"
"""


# One CPU for each rank, which the data workers share: a node here has two.
ONE_NODE, TWO_NODES = ("nodes=1", "gpus-per-node=2", "slurm-cpus=2"), ("nodes=2", "gpus-per-node=1", "slurm-cpus=1")


@pytest.mark.parametrize("overrides", [ONE_NODE, TWO_NODES], ids=["one node", "two nodes"])
def test_a_job_has_the_losses_of_the_recipe_started_here(
    slurm: Slurm, undisturbed: TrainingLog, text: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    job = Job(slurm, text, tmp_path / "a run", *overrides)
    shown = slurm.tell("scontrol", "show", "job", job.number)
    assert "NumCPUs=2 " in shown, "one for each rank"
    assert job.wait_for_end() == "COMPLETED", job.log()[-6000:]
    log = read_training_log(job.run / "log.txt")
    assert sorted(log.loss) == list(range(1, 41))
    assert (log.loss, log.final) == (undisturbed.loss, undisturbed.final)
    assert "done: iteration 40 of 40 is saved" in job.log()
    saved = json.loads((job.run / "recipe.json").read_text())
    assert saved["settings"]["train-iters"] == 40
    assert saved["versions"]["megatron-core"]


@pytest.mark.parametrize(
    ("disturb", "overrides"),
    [(preempt, TWO_NODES), (requeue, ONE_NODE), (signal_steps, ONE_NODE)],
    ids=["preempted on two nodes", "requeued by hand", "TERM before the time limit"],
)
def test_a_job_that_is_cut_short_saves_is_queued_again_and_ends_as_if_undisturbed(
    slurm: Slurm, undisturbed: TrainingLog, text: Path, tmp_path: Path, disturb: Callable[[Job], None],
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    job = Job(slurm, text, tmp_path / "run", "save-interval=1000", *overrides)
    job.wait_for_iteration(12)
    disturb(job)
    assert job.wait_for_end() == "COMPLETED", job.log()[-6000:]
    assert slurm.restarts(job.number) == 1
    log = read_training_log(job.run / "log.txt")
    assert (log.loss, log.final) == (as_resumed(undisturbed, job.went_on_from()), undisturbed.final)


def test_a_killed_rank_is_started_again_inside_the_job(
    slurm: Slurm, undisturbed: TrainingLog, text: Path, tmp_path: Path
) -> None:
    job = Job(slurm, text, tmp_path / "run", "max-restarts=1", *TWO_NODES)
    job.wait_for_iteration(13)
    slurm.machines.ranks(1)[0].kill()
    assert job.wait_for_end() == "COMPLETED", job.log()[-6000:]
    assert slurm.restarts(job.number) == 0
    log = read_training_log(job.run / "log.txt")
    assert (log.loss, log.final) == (as_resumed(undisturbed, job.went_on_from()), undisturbed.final)


def test_a_job_runs_through_a_container_runtime_on_every_node(slurm: Slurm, text: Path, tmp_path: Path) -> None:
    """Slurm reads the further options, and the words reach the runtime and, through it, torchrun."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apptainer").write_text(APPTAINER.format(folder=tmp_path))
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    job = Job(
        slurm, text, tmp_path / "a run", "train-iters=4", "lr-warmup-iters=1", "eval-interval=4", "save-interval=4",
        "norm-ratio-interval=0", "container=apptainer", "container-image=lion.sif", "slurm-exclusive=true",
        f"slurm-python={sys.executable}", f"slurm-setup=export PATH={tmp_path}/bin:$PATH",
        "slurm-sbatch-args=--comment='my run' --nice=1", "slurm-srun-args=--label", *TWO_NODES,
    )  # fmt: skip
    shown = slurm.tell("scontrol", "show", "job", job.number)
    assert "Comment=my run" in shown and "OverSubscribe=NO" in shown
    assert job.wait_for_end() == "COMPLETED", job.log()[-6000:]
    assert re.search(r"^[01]: .* iteration +4/ +4 ", job.log(), re.MULTILINE), "srun labels lines with the node"
    for node in range(2):
        words = (tmp_path / f"apptainer.{node}").read_text().splitlines()
        assert words[:2] == ["exec", "--bind"]
        assert f"{tmp_path}/a run:{tmp_path}/a run" in words[2].split(",")
        assert words[3:6] == ["--pwd", str(ROOT), str(ROOT / "lion.sif")]
        assert "MEGATRON_LION_DEVICE=cpu" in words
