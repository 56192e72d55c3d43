"""``norm_ratio.jsonl``: one object a round, appended, so that a run that is killed loses none that was measured."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rounds in a file of :class:`RecordFile`, in order. A last line that was cut off is left out.

    Raises LionError where the file is missing, holds no round, or is no such file.
    """
    if not path.is_file():
        raise LionError(f"{path} does not exist: give the norm_ratio.jsonl of a run with --norm-ratio-interval")
    records, cut_off = _split(path)
    bad = cut_off[0] if cut_off else ""
    if len(cut_off) > 1 or (bad and records and not bad.startswith("{")):
        raise LionError(f"{path} is no norm_ratio.jsonl: it has the line {bad[:80]!r}")
    if not records:
        raise LionError(f"{path} holds no round: did the run reach --norm-ratio-interval?")
    return [record for _, record in records]


class RecordFile:
    """The file that a run's rounds are appended to.

    Args:
        path: made with its folders where it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.superseded = path.with_name(path.name + ".superseded")

    def resume(self, iteration: int) -> str | None:
        """Make the file ready for a run that starts at ``iteration``.

        A run that was killed and resumed from an earlier checkpoint measures again what came after it. Those lines, and
        one that was cut off, move to ``<file>.superseded``, so that each round is there once and nothing is lost.

        Returns:
            What was moved, in words, or None. Raises LionError where the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8"):
                pass
            records, moved = _split(self.path)
            later = [line for line, record in records if record["iteration"] > iteration]
            moved = later + moved
            if not moved:
                return None
            with self.superseded.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in moved)
            kept = self.path.with_name(self.path.name + ".tmp")
            kept.write_text("".join(f"{line}\n" for line, _ in records[: len(records) - len(later)]), encoding="utf-8")
            os.replace(kept, self.path)
        except OSError as error:
            raise LionError(f"--norm-ratio-file {self.path} cannot be written: {error}") from error
        return f"{len(moved)} lines of {self.path} lie after iteration {iteration}: moved to {self.superseded}"

    def is_empty(self) -> bool:
        """Whether no round is in the file yet."""
        return not _split(self.path)[0]

    def append(self, line: str) -> None:
        """Append one line of JSON, and have it on disk before this returns. Ends a last line that has no newline.

        Raises OSError where it cannot be written. The file is then as it was, without a part of the line.
        """
        with self.path.open("ab+", buffering=0) as file:  # a buffer would be written again where the file is closed
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            unfinished = file.read() not in (b"", b"\n")
            rest = f"{'\n' if unfinished else ''}{line}\n".encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


def _split(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The lines that are rounds, each with its object and by iteration, and those that are not."""
    records, others = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            records.append((line, record))
        elif line.strip():
            others.append(line)
    return sorted(records, key=lambda pair: pair[1]["iteration"]), others
