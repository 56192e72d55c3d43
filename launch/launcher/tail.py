"""Follow a file that another process writes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_SECONDS = 0.05


def lines_of(path: Path, start: int, ended: Callable[[], bool]) -> Iterator[str]:
    """Each line after byte ``start``, its end included, until ``ended()``; what is left without an end comes last.

    From a file: a pipe would stay open for as long as anything that a killed rank had started lives on.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        partial, is_over = "", False
        while not is_over:
            is_over = ended()  # asked before reading: what was written until then is read
            for text in file:
                partial += text
                if partial.endswith("\n"):
                    yield partial
                    partial = ""
            if not is_over:
                time.sleep(POLL_SECONDS)
        if partial:
            yield partial
