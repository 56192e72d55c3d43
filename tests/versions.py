"""Runs with any released Megatron: its wheel in a folder of its own, its ranks forked from a process of its own.

The wheels are fetched from the package index, with nothing that they depend on (``wheels.py``).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.integration.compat.versions import megatron_version, minor_version
from megatron_lion.training_log import TrainingLog
from tests import harness, wheels

# The wheel of the first has only megatron.core; the others have Megatron's own loop too.
RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")


def since(minor: str) -> pytest.MarkDecorator:
    """Skips a test on a Megatron older than ``minor``."""
    return pytest.mark.skipif(minor_version() < minor, reason=f"from megatron-core {minor} on")


def until(minor: str) -> pytest.MarkDecorator:
    """Skips a test on a Megatron newer than ``minor``."""
    return pytest.mark.skipif(minor_version() > minor, reason=f"up to megatron-core {minor}")


def others_with_a_loop() -> list[str]:
    """The releases, but for the environment's own, whose wheel has Megatron's own loop."""
    return [version for version in RELEASES[1:] if version != megatron_version()]


def wheel(version: str) -> Path:
    """The folder with only megatron-core ``version``. Skips the test if it cannot be fetched."""
    return wheels.fetched(version, f"megatron-core=={version}")


class Megatron:
    """One released Megatron, and the process from which its ranks are forked."""

    def __init__(
        self, version: str, folders: Iterable[Path] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """``folders`` are further ones to import from, ``environment`` has further variables."""
        self.version = version
        own = version == megatron_version()  # the environment's
        path = [os.environ["PYTHONPATH"], *map(str, folders), *([] if own else [str(wheel(version))])]
        self.environment = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(path)}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.versions"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def run(self, *flags: str, **options: Any) -> harness.Run:
        """As :func:`harness.run_ranks`, with this Megatron."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"flags": flags, **options}
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        log = TrainingLog()
        for line in answer["output"].splitlines():
            log.add_line(line)
        return harness.Run(answer["returncode"], answer["output"], log)

    def pretrain(self, text: Path, *flags: str, **options: Any) -> harness.Run:
        """As :func:`harness.pretrain`, with this Megatron."""
        run = self.run(*harness.pretrain_flags(text), *flags, **options)
        if options.get("kill_at") is None:
            assert run.returncode == 0, run.output[-6000:]
        return run

    def close(self) -> None:
        """End the process, and with it the server that ranks are forked from."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def started(version: str) -> Iterator[Megatron]:
    """A fixture's body: the Megatron while the tests that need it run."""
    megatron = Megatron(version)
    yield megatron
    megatron.close()


def serve() -> None:
    """Run what is asked for, a line of JSON each, and answer with a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        request = json.loads(line)
        if "script" in request:
            request["script"] = Path(request["script"])
        run = harness.run_ranks(*request.pop("flags"), **request)
        print(json.dumps({"returncode": run.returncode, "output": run.output}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
