"""--exit-signal-handler: keep a rank's child processes alive when a signal makes the rank save and end."""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any


@contextlib.contextmanager
def processes_live_through_it(args: Any) -> Iterator[None]:
    """Block the exit signal in this thread. Processes that are started inside inherit this for good.

    torchrun and Slurm send the signal to all processes of a rank, and the rank needs them to save: the workers that
    read data, the server of the queue through which a checkpoint's writers report, a writer in the background. A signal
    to the rank itself waits until the end of the block. Without ``args.exit_signal_handler`` nothing is blocked.

    Args:
        args: Megatron's arguments.
    """
    blocked = {getattr(args, "exit_signal", signal.SIGTERM)} if args.exit_signal_handler else set()
    resource_tracker.ensure_running()  # else started inside, and its start unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
