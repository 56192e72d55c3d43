"""A real Slurm on this machine: its daemons on the two "machines" of ``machines.py``, each with a host name of its own.

Each machine's daemons live in namespaces of host name, processes and mounts, whose first process takes all the others
with it; that one ends with the process that started it, whatever became of it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.harness import ROOT
from tests.launch.machines import ADDRESSES, Machines

NODES = ("node1", "node2")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIGURATION = """\
ClusterName=lion
SlurmctldHost=node1({first})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr={first} CPUs=2
NodeName=node2 NodeAddr={second} CPUs=2
PartitionName=runs Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
# A job that was queued again waits for the life of its credential (cred_expire, 120 s where a cluster does not say).

START = """\
set -e
hostname {node}
mount --bind {folder}/hosts /etc/hosts
export SLURM_CONF={folder}/slurm.conf
if [ {node} = node1 ]; then
    munged --foreground --force --socket={folder}/munge.socket --key-file={folder}/munge.key --num-threads=1 \
        --pid-file={folder}/munge.pid --seed-file={folder}/munge.seed --log-file={folder}/munge.log &
    until [ -S {folder}/munge.socket ]; do sleep 0.1; done
    slurmctld -D &
fi
slurmd -D &
wait
"""


def missing() -> str | None:
    """Why no Slurm can be started here."""
    if absent := [name for name in NEEDED if shutil.which(name, path=_path()) is None]:
        return f"no {', '.join(absent)} here: apt-get install slurmctld slurmd slurm-client munge (Debian, Ubuntu)"
    return None if os.geteuid() == 0 else "Slurm's daemons and network namespaces need root"


class Slurm:
    """Both nodes, idle, for the time of a ``with``: partition ``runs``, and ``urgent``, which preempts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines = Machines(folder)

    def __enter__(self) -> "Slurm":
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        hosts = [f"{address} {node}\n" for address, node in zip(ADDRESSES, NODES, strict=True)]
        (self.folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *hosts]))
        places = {"folder": self.folder, "first": ADDRESSES[0], "second": ADDRESSES[1]}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**places))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # the search for one fails in a namespace
        self.machines.__enter__()
        try:
            for number, node in enumerate(NODES):
                (self.folder / f"start-{node}.sh").write_text(START.format(node=node, folder=self.folder))
                own = "setpriv --pdeathsig KILL unshare --uts --pid --mount-proc --fork --kill-child"
                self.machines.start(number, f"PATH={_path()} exec {own} bash {self.folder}/start-{node}.sh")
            self.wait_until("both nodes are idle", lambda: self.tell("sinfo", "-ht", "idle", "-o", "%D") == "2", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.machines.__exit__()

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """A command on node1, to its end."""
        line = ["ip", "netns", "exec", self.machines.names[0], *words]
        environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)

    def tell(self, *words: str) -> str:
        """What a command of Slurm's says; empty where it fails."""
        return self.run(*words).stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self._shown(job).get("JobState", "UNKNOWN")

    def restarts(self, job: str) -> int:
        """How often the job was queued again."""
        return int(self._shown(job).get("Restarts", 0))

    def _shown(self, job: str) -> dict[str, str]:
        words = self.tell("scontrol", "show", "--oneliner", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, what: str, holds: Callable[[], bool], seconds: float) -> None:
        """Until ``holds()``; fails with what the daemons and the queue say."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"not after {seconds:g} s: {what}\n{self.said()}"
            time.sleep(0.5)

    def said(self) -> str:
        """The queue, the nodes and the ends of the daemons' logs."""
        logs = [path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([self.tell("squeue"), self.tell("sinfo", "-N", "-l"), *logs])


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
