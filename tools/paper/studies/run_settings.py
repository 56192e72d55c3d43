"""The settings of a long run, and the check that a run is resumed, or counted as finished, only with the same ones."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError

# Settings that are the same for all runs, or name folders, are left out.
LEFT_OUT = ("data", "-path", "-file", "run", "save", "load", "tensorboard-dir", "slurm", "gpu", "distributed")
MINUTES = "--exit-duration-in-mins"  # of a piece; has no effect on the result


def kept(settings: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """The settings of a recipe that describe a run, and as ``flags`` Megatron's flags beyond them."""
    described = {key: value for key, value in settings.items() if not _is_left_out(key)}
    if MINUTES in flags:
        at = flags.index(MINUTES)
        flags = [*flags[:at], *flags[at + 2 :]]
    return described | {"flags": " ".join(flags)}


def check_folder(folder: Path, own: Mapping[str, Any]) -> None:
    """Raise LionError if a start of a run in ``folder`` had other settings than ``own``."""
    for path in sorted(folder.glob("recipe*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        _compare(
            f"{folder} has a run", kept(saved["settings"], saved["extra"]), own, "remove it, or use another --output"
        )


def check_record(path: Path, own: Mapping[str, Any]) -> None:
    """Raise LionError if the record in ``path`` is of a run with other settings than ``own``."""
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    _compare(f"{path} is of a run", settings, own, "remove it, or use another --records")


def _compare(what: str, before: Mapping[str, Any], own: Mapping[str, Any], remedy: str) -> None:
    for key in sorted(before.keys() | own.keys()):
        if before.get(key) != own.get(key):
            raise LionError(f"{what} with {key}={before.get(key)}, not {own.get(key)}: {remedy}")


def _is_left_out(key: str) -> bool:
    return any(key == part or key.startswith(f"{part}-") or key.endswith(part) for part in LEFT_OUT)
