"""Follow a file that another process writes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_SECONDS = 0.05


def lines_of(path: Path, start: int, ended: Callable[[], bool]) -> Iterator[str]:
    """Yield each line after byte ``start``, with its line break, until ``ended()``. An unfinished line comes last.

    It reads a file, because a pipe stays open as long as any process that a killed rank had started.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        partial, is_over = "", False
        while not is_over:
            is_over = ended()  # asked before reading, so that everything written by then is read
            for text in file:
                partial += text
                if partial.endswith("\n"):
                    yield partial
                    partial = ""
            if not is_over:
                time.sleep(POLL_SECONDS)
        if partial:
            yield partial
