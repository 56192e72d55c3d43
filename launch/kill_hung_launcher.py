#!/usr/bin/env python3
"""Run a launcher, and kill it when it hangs.

torchrun (2.13) asks the rendezvous store again and again whether nodes are waiting (``num_nodes_waiting``). If the link
to the store's machine is cut, that call waits in the kernel, past all of torchrun's timeouts, and ignores SIGTERM and
Ctrl-C. So a second process watches the launcher and kills it after SECONDS without a rank. SECONDS must exceed the
time-out of the rendezvous, because nodes have no ranks while they wait for each other.
"""

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

POLL_SECONDS = 5.0


def main(arguments: list[str]) -> None:
    """Replace this process by the launcher, with a child that watches it. Signals reach the launcher directly."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="kill_hung_launcher.py [-h] SECONDS torchrun ...",
    )
    parser.add_argument("seconds", type=float, metavar="SECONDS", help="kill a launcher without ranks after this time")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="torchrun ...", help="the launcher's command line")
    options = parser.parse_args(arguments)
    seconds, command = options.seconds, options.command
    if not command:
        parser.error("no launcher given, such as torchrun ...")
    launcher = os.getpid()
    handle = os.pidfd_open(launcher)
    if os.fork() == 0:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they are for the launcher; when it ends, so does this process
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        watch(launcher, handle, seconds)
        os._exit(0)
    os.execvp(command[0], command)


def watch(launcher: int, handle: int, seconds: float) -> None:
    """Return when the launcher has ended. Kill it if it has had no rank for ``seconds``."""
    ended = select.poll()
    ended.register(handle, select.POLLIN)
    last = time.monotonic()
    while not ended.poll(1000 * min(POLL_SECONDS, seconds / 8)):
        if has_ranks(launcher):
            last = time.monotonic()
        elif time.monotonic() - last > seconds:
            print(
                f"megatron-lion: torchrun has had no rank for {seconds:g} s and does not end: killed. The machine that "
                "hosts the rendezvous (--rdzv-endpoint) is probably out of reach",
                file=sys.stderr,
                flush=True,
            )
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            return


def has_ranks(launcher: int) -> bool:
    """Whether a child of the launcher is a running rank. A child that has ended has no environment."""
    children: list[str] = []
    for task in Path(f"/proc/{launcher}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            children += task.read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return True
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
