"""Log lines of this package, printed on rank 0."""

import os
import sys

PREFIX = "megatron-lion:"


def say(message: str) -> None:
    """Print one line on rank 0, as Megatron does."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{PREFIX} {message}", flush=True)


def warn(message: str) -> None:
    """Print one warning line on rank 0's stderr."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{PREFIX} warning: {message}", file=sys.stderr, flush=True)


def warn_here(message: str) -> None:
    """Print one warning line on this rank's stderr, for facts that only this rank knows."""
    print(f"{PREFIX} warning: {message}", file=sys.stderr, flush=True)
