"""A child process that ends with this one, after time to save."""

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
    """Start ``line`` and wait for its end when the block is left, also through an exception.

    The first Ctrl-C, SIGTERM or SIGHUP, or an exception in the block, sends the child one SIGTERM; the block goes on.
    torchrun hands SIGTERM to its ranks, which save (``--exit-signal-handler``). The child has its own session: from the
    terminal's Ctrl-C it would hand on SIGINT, which ends ranks without a save, and a further signal cuts torchrun's
    shutdown short. A signal that is ignored when this process starts (``nohup``) stays ignored.
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
        if is_asked:  # a signal came before there was a process to tell
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
