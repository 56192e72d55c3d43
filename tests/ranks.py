"""Ranks of a run, forked from a server that has imported Megatron once (``preloaded.py``).

A rank is a process of its own with the environment that torchrun would give it; torch.distributed, Megatron and the
script are the real ones. Only the start is another: no launcher, no imports. MEGATRON_LION_TESTS_TORCHRUN=1 starts
every run with torchrun instead, as users do.
"""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from launch.launcher.forked_script import become
from launch.launcher.tail import lines_of


class Ranks:
    """Running ranks, whose output comes line by line. The first that fails ends the others, as under torchrun."""

    def __init__(self, script: Path, arguments: list[str], count: int, environment: dict[str, str]) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["tests.preloaded"])
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name) / "output"
        self._output.touch()
        self._reserved = reserved_port()
        port = self._reserved.getsockname()[1]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        self._processes: list[BaseProcess] = []
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), **rendezvous}
            what = (str(self._output), str(script), arguments, {**environment, **place}, os.getcwd())
            self._processes.append(server.Process(target=_run, args=what))
        for process in self._processes:
            process.start()

    def lines(self) -> Iterator[str]:
        """Each line as it is written, until all ranks have ended."""
        return lines_of(self._output, 0, lambda: not self._watch())

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL every rank, or ``rank`` alone, and the processes that it started itself, which would live on."""
        for process in self._processes if rank is None else [self._processes[rank]]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()

    def wait(self) -> int:
        """The exit status of the first rank that failed, else 0."""
        for process in self._processes:
            process.join()
        self._reserved.close()
        self._folder.cleanup()
        return next((code for process in self._processes if (code := process.exitcode)), 0)

    def _watch(self) -> bool:
        """Whether a rank is still running; kills the rest once one has failed."""
        failed = any(process.exitcode for process in self._processes)
        alive = [process for process in self._processes if process.is_alive()]
        if failed and alive:
            time.sleep(1.0)  # for the message of another rank
            self.kill()
        return bool(alive)


def _run(output: str, script: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    os.chdir(folder)
    become(script, arguments, output, environment)


def reserved_port() -> socket.socket:
    """A socket bound to a free port, which nobody else is given while it is open. It does not listen: rank 0 can."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store sets it: both may be bound
    reserved.bind(("127.0.0.1", 0))
    return reserved
