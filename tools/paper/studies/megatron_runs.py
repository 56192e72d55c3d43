"""Short Megatron runs on this machine's CPU, one process each, forked from a server that has imported Megatron once.

Each run is the project's own script with its own command line, as ``torchrun --nproc-per-node 1`` would start it. A run
that is complete in its folder is kept, so that a study that was stopped goes on where it was.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.launcher.forked_script import become
from megatron_lion.config import LionError
from megatron_lion.integration.cpu import run_flags

ROOT = Path(__file__).resolve().parents[3]
PRETRAIN = {"gpt": ROOT / "launch" / "pretrain_gpt.py", "bert": ROOT / "launch" / "pretrain_bert.py"}
FINISHED = "finished.json"
CPU_SECONDS = "cpu_seconds"  # file of a run that ended, and key of ``FINISHED``
CPU = f"{run_flags.FLAGS} --num-workers 0"
ENVIRONMENT = {**run_flags.ENVIRONMENT, "PYTHONWARNINGS": "ignore"}


# Larger than a real model's. The first two are the demo's (docs/results/demo.md); Adam's is not tuned.
LEARNING_RATES = {"lion": 1e-3, "sgd": 0.1, "adam": 2e-3}
WEIGHT_DECAYS = {"lion": 0.1, "sgd": 1e-4, "adam": 0.1}


def optimizer_flags(name: str, lr: float | None = None) -> str:
    """Megatron's flags for an optimizer, at the rate of LEARNING_RATES unless told."""
    return f"--optimizer {name} --lr {lr or LEARNING_RATES[name]:g} --weight-decay {WEIGHT_DECAYS[name]:g}"


@dataclass(frozen=True, kw_only=True)
class MegatronRun:
    """A command line and the folder that its log and its records go to."""

    folder: Path
    flags: str
    script: Path = PRETRAIN["gpt"]

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the whole run, made with these flags."""
        try:
            return bool(json.loads((self.folder / FINISHED).read_text(encoding="utf-8"))["flags"] == self.flags)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def command(self) -> str:
        """The command line that does the same under torchrun."""
        script = self.script.relative_to(ROOT)
        return f"MEGATRON_LION_DEVICE=cpu torchrun --nproc-per-node 1 {script} {self.flags}"


def run_all(runs: Sequence[MegatronRun], threads: int) -> None:
    """Run those of ``runs`` that are not finished, one after the other, with a line about each.

    Raises LionError with the end of the log where one fails; those before it stay finished.
    """
    began, done = time.monotonic(), 0
    kept = sum(run.is_finished for run in runs)
    for number, run in enumerate(runs, start=1):
        if run.is_finished:
            continue
        seconds = _run(run, threads)
        done += 1
        left = (time.monotonic() - began) / done * (len(runs) - kept - done)
        print(f"  {number}/{len(runs)} {run.folder.name}: {seconds:.0f} s, about {left / 60:.0f} min left", flush=True)
    if kept:
        print(f"  {kept} of {len(runs)} runs were complete and were kept")


def _run(run: MegatronRun, threads: int) -> float:
    """Start ``run`` in a process of its own and wait for it; returns its seconds."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    for old in (log, run.folder / FINISHED, run.folder / "norm_ratio.jsonl"):
        old.unlink(missing_ok=True)
    # The server reads them when it starts: threads of torch are counted at its import.
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tools.paper.studies.rank_imports"])
    began = time.monotonic()
    used = run.folder / CPU_SECONDS
    process = server.Process(target=_run_as_rank_0, args=(str(log), str(run.script), run.flags.split(), str(used)))
    process.start()
    try:
        process.join()
    finally:  # Ctrl-C above all
        process.kill()
    if process.exitcode:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
        raise LionError(f"{run.folder.name} failed with exit status {process.exitcode}; {log} ends with\n{tail}")
    finished = {"flags": run.flags, "command": run.command(), CPU_SECONDS: float(used.read_text())}
    (run.folder / FINISHED).write_text(json.dumps(finished) + "\n")
    used.unlink()
    return time.monotonic() - began


def _run_as_rank_0(log: str, script: str, arguments: list[str], used: str) -> None:
    """The only rank of a run, with the environment that torchrun would give it. Leaves its CPU time in ``used``."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    try:
        become(script, arguments, log, {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    finally:  # a script may end with SystemExit
        Path(used).write_text(f"{time.process_time():.1f}")
