"""Results of earlier self-checks, in files that ranks of a node and later runs share."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lion.kernels import compiler

POLL_SECONDS = 0.1

Record = dict[str, Any]


def is_whole(record: Record) -> bool:
    """Whether it has a child's answer, or the ``failure`` to get one."""
    return "failure" in record or {"difference", "elements", "seconds"} <= record.keys()


def path_of(key: Record) -> Path:
    """The file for ``key``, in the cache folder of the compiled CPU kernel. Raises OSError if there is none."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return compiler.cache_folder() / f"self_check-{digest}.json"


def read(path: Path, key: Record) -> Record | None:
    """The record that was written for ``key``. None if there is none, if it has expired or cannot be trusted."""
    try:
        if not compiler.is_private(path):
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        record = dict(stored["record"])
        return record if stored["key"] == key and time.time() < stored["expires"] and is_whole(record) else None
    except (OSError, ValueError, KeyError, TypeError):  # missing, cut off, or not ours
        return None


def write(path: Path, key: Record, record: Record, seconds: float) -> None:
    """Store ``record``, valid for ``seconds``, with one atomic rename. Does nothing if the folder cannot be written."""
    text = json.dumps({"key": key, "record": record, "expires": time.time() + seconds})
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of ``path`` against other processes. Gives up waiting after ``seconds``.

    The lock of a process that has ended is free. Where the file system has no locks, or cannot be written, several
    processes check at once, which is slower but does no harm.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            stack.callback(os.close, handle)
            deadline = time.monotonic() + seconds
            while not _taken(handle) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        yield


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
