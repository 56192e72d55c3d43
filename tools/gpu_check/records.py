"""rows.jsonl: one JSON line for each result, on disk as soon as it is known. Imports only the standard library."""

import json
from pathlib import Path
from typing import Any


def append(path: Path | None, **record: object) -> None:
    """Add one line; nothing where ``path`` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path, key: str) -> list[dict[str, Any]]:
    """The records that have ``key``. A last line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if key in record:
            records.append(record)
    return records
