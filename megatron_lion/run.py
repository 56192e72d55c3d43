"""``torchrun -m megatron_lion.run SCRIPT ARGS``: register, then run the user's own Megatron script, unmodified."""

import contextlib
import os
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import megatron_lion
from megatron_lion.config import LionError, LocalError

GRACE_SECONDS = 5.0


def report_on_rank_0(error: LionError) -> None:
    """Print one line on rank 0, or on the rank that met a LocalError; let the other ranks wait for it, since torchrun
    ends all once one has ended."""
    if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, LocalError):
        print(f"megatron-lion: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn LionError into one line on rank 0's stderr and exit status 2 on every rank."""
    try:
        yield
    except LionError as error:
        report_on_rank_0(error)
        sys.exit(2)


def main() -> None:
    """Run ``sys.argv[1]`` as ``__main__`` with the rest as its arguments, as ``python SCRIPT ARGS`` would."""
    with readable_errors():
        if len(sys.argv) < 2:
            raise LionError(
                "no script given: torchrun -m megatron_lion.run /path/to/pretrain_gpt.py --optimizer lion ..."
            )
        script = Path(sys.argv[1])
        if not script.is_file():
            raise LionError(f"{script} is not a file: give the path of your Megatron script, such as pretrain_gpt.py")
        # As Python does for a script: its folder comes first, so that the modules beside it are found.
        sys.path.insert(0, str(script.resolve().parent))
        megatron_lion.register()
        sys.argv = sys.argv[1:]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
