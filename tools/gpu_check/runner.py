"""Run parts one after another, each to its end or to its time limit. Imports only the standard library."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_check.parts import ENVIRONMENT, Part

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0  # after SIGINT, in which pytest prints what it has found so far
NOTHING_CAN_BE_CHECKED = 2  # the environment part's exit status


@dataclass
class Outcome:
    """How a part ended; ``result`` is "passed" or says what went wrong."""

    part: Part
    result: str
    seconds: float
    log: Path
    status: int | None = None

    @property
    def passed(self) -> bool:
        """Whether it ended with status 0 within its time."""
        return self.result == "passed"


def run_all(parts: Sequence[Part], work: Path, environment: dict[str, str], seconds: float) -> Iterator[Outcome]:
    """Run ``parts`` in at most ``seconds`` in all, and give each outcome as it comes.

    Nothing runs after an environment in which nothing can be checked.
    """
    deadline = time.monotonic() + seconds
    for number, part in enumerate(parts):
        log = work / f"{number:02}.log"
        left = deadline - time.monotonic() - GRACE_SECONDS
        if left < 1:
            log.write_text("")
            outcome = Outcome(part, f"not run: the {seconds:.0f} s for all parts are used up", 0.0, log)
        else:
            outcome = run(part, log, environment, min(part.seconds, left))
        yield outcome
        if part.name == ENVIRONMENT and outcome.status == NOTHING_CAN_BE_CHECKED:
            return


def run(part: Part, log: Path, environment: dict[str, str], seconds: float) -> Outcome:
    """Run one part; when ``seconds`` are over, end it and every process that it started."""
    start = time.monotonic()
    status = None
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(part.command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            result = "passed" if status == 0 else f"failed: exit status {status}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {seconds:.0f} s"
            end(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            end(process, signal.SIGKILL)
            process.wait()
    return Outcome(part, result, time.monotonic() - start, log, status)


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the process's group, which may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
