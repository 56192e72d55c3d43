"""Two "machines" on this one: network namespaces with their own addresses, joined by a pair of virtual interfaces."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.harness import ROOT

ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "lion0"


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


class Machines:
    """Both machines, for the time of a ``with``; what was started on them ends with it.

    Raises OSError or CalledProcessError where the kernel, or a lack of rights or of iproute2, refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.names = [f"lion{os.getpid()}-{node}" for node in range(2)]
        self.logs = [folder / f"machine{node}.log" for node in range(2)]
        self.started: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Machines":
        try:
            for name in self.names:
                ip(f"netns add {name}")
            ip(f"link add {INTERFACE} netns {self.names[0]} type veth peer name {INTERFACE} netns {self.names[1]}")
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip(f"-n {name} addr add {address}/24 dev {INTERFACE}")
                for interface in ("lo", INTERFACE):
                    ip(f"-n {name} link set {interface} up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for node, process in self.started.items():
            for victim in [*self.processes(node), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, node: int, line: str) -> None:
        """Run a shell line on a machine; its output goes to the machine's log."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with self.logs[node].open("ab") as log:
            self.started[node] = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], "bash", "-c", line],
                stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "PATH": path},
            )  # fmt: skip

    def link(self, state: str) -> None:
        """Take the link "down", or "up" again."""
        ip(f"-n {self.names[0]} link set {INTERFACE} {state}")

    def processes(self, node: int) -> list[psutil.Process]:
        try:
            return psutil.Process(self.started[node].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def ranks(self, node: int) -> list[psutil.Process]:
        """The machine's ranks and what they started, not their launcher."""
        found = []
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                found += [process] if "RANK" in process.environ() else []
        return found

    def kill_ranks(self, node: int) -> None:
        """SIGKILL the machine's ranks."""
        for process in self.ranks(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_for_no_ranks(self, node: int, seconds: float) -> None:
        """Until the machine's ranks have ended."""
        deadline = time.monotonic() + seconds
        while left := self.ranks(node):
            assert time.monotonic() < deadline, f"{left} still run:\n{self.output()[-6000:]}"
            time.sleep(0.1)

    def output(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def wait_for(self, text: str, seconds: float) -> None:
        """Until one of the machines has written ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.output():
            ended = [process.poll() for process in self.started.values()]
            assert time.monotonic() < deadline and None in ended, f"no {text!r}, {ended}:\n{self.output()[-6000:]}"
            time.sleep(0.1)

    def wait(self, seconds: float) -> list[int]:
        """The exit status of each machine's line; fails where one has not ended in time."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.started.values()]
