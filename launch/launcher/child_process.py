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
    process: subprocess.Popen[bytes] | None = None
    is_asked = False

    def end(*_: object) -> None:
        nonlocal is_asked
        if not is_asked and process is not None:
            process.terminate()
            with contextlib.suppress(OSError):
                os.write(2, NOTICE)  # print is not safe in a signal handler
        is_asked = True

    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, end) for number in handled}
    try:
        process = subprocess.Popen(line, start_new_session=True, **options)
        if is_asked:  # a signal arrived before the process existed
            process.terminate()
        yield process
    finally:
        if process is not None:
            if process.poll() is None and not is_asked:
                is_asked = True
                process.terminate()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
