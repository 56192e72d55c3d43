"""Run a function on every rank and report the ranks that do not answer.

The ranks talk through the launcher's key-value store. No collective is issued.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from megatron_lion.config import LionError

GRACE_SECONDS = 10.0  # extra time for rank 0 to report which ranks are missing
NAMED = 4  # failed ranks that a message lists
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RanksUnreachable(LionError):
    """Some ranks did not answer in time."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def rank_and_node(rank: int) -> str:
    """Name a rank by its number and, if every node has as many ranks, by its node. Both count from 0."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return f"rank {rank} (node {rank // local})" if local else f"rank {rank}"


class RankRunner:
    """The ranks that the launcher's environment (``LAUNCHER``) describes. They meet at its master address.

    Attributes:
        rank, size: this rank and their number.
        timeout: seconds that a rank may take to answer.
    """

    def __init__(self, timeout: float) -> None:
        missing = [name for name in LAUNCHER if name not in os.environ]
        if missing:
            raise LionError(
                f"--cluster runs on every rank of a launcher, and {missing[0]} is not set: torchrun --nproc-per-node 8 "
                "--no-python megatron-lion doctor --cluster"
            )
        self.rank, self.size, self.timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout
        self.store = self._meet()

    def _meet(self) -> Store:
        """The store that torchrun's agent has, or, under another launcher, one on rank 0."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        master = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        patience = timedelta(seconds=self.timeout)
        try:
            # Do not wait for the others here: missing ranks are reported by number later.
            store = TCPStore(host, port, self.size, master, patience, wait_for_workers=False)
        except RuntimeError as error:
            raise RanksUnreachable(
                f"rank {self.rank} cannot reach {host}:{port} (MASTER_ADDR:MASTER_PORT), where rank 0's node listens, "
                f"within {self.timeout:g} s: {_first_line(error)}",
                [0],
            ) from error
        return PrefixStore("megatron-lion-doctor", store)

    def ask(self, question: str, answer: Any) -> list[Any]:
        """Every rank's ``answer`` (anything that JSON can hold), by rank, on every rank.

        Raises RanksUnreachable with those that did not give one in time.
        """
        self.store.set(f"{question}/{self.rank}", json.dumps(answer))
        if self.rank == 0:
            deadline = time.monotonic() + self.timeout
            there = [self._wait(f"{question}/{rank}", deadline - time.monotonic()) for rank in range(self.size)]
            self.store.set(f"{question}/all", json.dumps(there))
        elif not self._wait(f"{question}/all", self.timeout + GRACE_SECONDS):
            raise RanksUnreachable(f"rank 0 did not answer within {self.timeout:g} s ({question})", [0])
        else:
            there = json.loads(self.store.get(f"{question}/all"))
        absent = [rank for rank, answered in enumerate(there) if not answered]
        if absent:
            names = ", ".join(rank_and_node(rank) for rank in absent)
            raise RanksUnreachable(f"{names} did not answer within {self.timeout:g} s ({question})", absent)
        return [json.loads(self.store.get(f"{question}/{rank}")) for rank in range(self.size)]

    def run_on_all_ranks(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """Run ``work``, which needs all ranks, on all of them, and return every rank's result.

        Raises LionError with the ranks on which it failed or did not end in time, and RanksUnreachable with those
        that never began.
        """
        self.ask(f"{what}: begin", True)
        outcome: dict[str, Any] = {"error": f"no end within {self.timeout:g} s"}
        thread = threading.Thread(target=_attempt, args=(work, outcome), daemon=True)
        thread.start()
        thread.join(self.timeout)
        outcomes = self.ask(f"{what}: end", dict(outcome))
        if failed := [f"{rank_and_node(rank)}: {one['error']}" for rank, one in enumerate(outcomes) if "error" in one]:
            more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
            raise LionError(f"{what} failed on {'; '.join(failed[:NAMED])}{more}")
        return [one["result"] for one in outcomes]

    def _wait(self, key: str, seconds: float) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:  # a time-out, or a store that is gone
            return False
        return True


def _attempt(work: Callable[[], Any], outcome: dict[str, Any]) -> None:
    try:
        outcome["result"] = work()
    except Exception as error:  # show the user whatever the backend raises
        outcome["error"] = _first_line(error)
    else:
        outcome.pop("error")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
