"""A child process that ends with this one and has time to save before."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE = b"megatron-lion: ending the run; waiting until its ranks have saved\n"


@contextlib.contextmanager
def tied(line: list[str], **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Start ``line``. On leaving the block, also by an exception, wait for it to end.

    The first Ctrl-C, SIGTERM, SIGHUP or exception sends the child one SIGTERM. After a signal the block continues.
    torchrun passes SIGTERM to its ranks, which save (``--exit-signal-handler``). The child has its own session, because
    torchrun would pass the terminal's Ctrl-C to the ranks, which then end without a save. A second signal would cut
    torchrun's shutdown short. A signal that is ignored when this process starts (``nohup``) stays ignored.
    """
    untold: list[subprocess.Popen[bytes]] = []  # the child, until its SIGTERM
    is_asked = False

    def tell() -> None:
        with contextlib.suppress(IndexError):
            untold.pop().terminate()  # pop is atomic: a signal in the middle of this line does not send a second one

    def end(*_: object) -> None:
        nonlocal is_asked
        tell()
        if not is_asked:
            is_asked = True
            with contextlib.suppress(OSError):
                os.write(2, NOTICE)  # print is not safe in a signal handler

    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, end) for number in handled}
    try:
        process = subprocess.Popen(line, start_new_session=True, **options)
        untold.append(process)
        try:
            if is_asked:  # a signal arrived before Popen returned: the child may run already
                tell()
            yield process
        finally:
            if process.poll() is None:
                tell()
            process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
