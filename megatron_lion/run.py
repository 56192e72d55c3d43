"""``torchrun -m megatron_lion.run SCRIPT ARGS``: register, then run the user's own Megatron script, unmodified."""

import contextlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import megatron_lion
from megatron_lion.config import LionError

# How long a rank other than 0 waits before it prints. Where all ranks fail alike, rank 0 prints at once and exits, and
# torchrun ends the others meanwhile. On a node without rank 0, the node's first rank does the same for its neighbors.
GRACE_SECONDS = 5.0
HELP = """usage: torchrun -m megatron_lion.run SCRIPT [FLAGS ...]

Register megatron-lion, then run SCRIPT, your own Megatron training script, with FLAGS. The script's folder comes
first on the path, as with `torchrun SCRIPT`. All flags: torchrun -m megatron_lion.run SCRIPT --help"""


def report_error(error: LionError) -> None:
    """Print ``error`` as one line on stderr: on rank 0 at once, on another rank after a grace period, with its name.

    ``RANK`` and ``LOCAL_RANK`` are torchrun's. A rank that is ended during the grace period prints nothing. SIGTERM
    ends it even where Megatron handles the signal. Call it from the main thread.
    """
    rank = int(os.environ.get("RANK", "0"))
    origin = ""
    if rank != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_first_of_node = os.environ.get("LOCAL_RANK") == "0"
        time.sleep(GRACE_SECONDS if is_first_of_node else 2 * GRACE_SECONDS)
        origin = f"[rank {rank}, {os.uname().nodename}] "
    # One write, so that lines of several ranks do not mix.
    print(f"megatron-lion: error: {origin}{error}\n", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn LionError into one line on stderr (see report_error) and exit status 2."""
    try:
        yield
    except LionError as error:
        report_error(error)
        sys.exit(2)


def main() -> None:
    """Run ``sys.argv[1]`` as ``__main__`` with the rest as its arguments, as ``python SCRIPT ARGS`` would."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(HELP)
        return
    with readable_errors():
        if len(sys.argv) < 2:
            raise LionError(
                "no script given: torchrun -m megatron_lion.run /path/to/pretrain_gpt.py --optimizer lion ..."
            )
        script = Path(sys.argv[1])
        if not script.is_file():
            raise LionError(f"{script} is not a file: pass the path of your Megatron script, such as pretrain_gpt.py")
        # As Python does for a script: its folder comes first, so that the modules next to it are found.
        sys.path.insert(0, str(script.resolve().parent))
        megatron_lion.register()
        sys.argv = sys.argv[1:]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
