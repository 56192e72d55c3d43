"""--exit-signal-handler: keep a rank's child processes alive when a signal makes the rank save and end."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker, util
from typing import Any


def kill_daemons_at_exit(args: Any) -> None:
    """Let this process end, although what it has started lives through SIGTERM.

    At exit Python sends SIGTERM to multiprocessing's daemons, such as a data loader's workers, and waits for them. With
    ``args.exit_signal_handler`` they block or handle SIGTERM, here and in Megatron (0.19.2: data_samplers 95). A rank
    that fails still holds its loaders, so it would wait forever, and torchrun with it. So daemons are killed.

    Args:
        args: Megatron's arguments.
    """
    if args.exit_signal_handler:
        util.Finalize(None, _kill_daemons, exitpriority=0)  # the last one before Python waits


def _kill_daemons() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a loader's worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


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
