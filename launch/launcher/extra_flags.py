"""Flags after ``--``. Keys of a recipe become overrides. The names of all other flags are checked."""

import functools
import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.nearest import hint

from .keys import MEGATRON_KEYS
from .recipe_files import ROOT

OURS = ROOT / "megatron_lion" / "integration"


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The ``key=value`` overrides among the words after ``--``, and the words that Megatron gets as they are.

    Raises LionError for a flag that the installed Megatron does not have, without starting it.
    """
    overrides: list[str] = []
    extra: list[str] = []
    for name, given, written in _grouped(words):
        if name not in MEGATRON_KEYS:
            _check_name(name)
            extra += written
        elif MEGATRON_KEYS[name] is bool and not given:
            overrides.append(f"{name}=true")
        elif MEGATRON_KEYS[name] is not bool and len(given) == 1:
            overrides.append(f"{name}={given[0]}")
        else:
            allowed = "no value" if MEGATRON_KEYS[name] is bool else "one value"
            raise LionError(f"--{name} after -- takes {allowed}, got {' '.join(given) or 'none'}")
    return overrides, extra


def values(extra: list[str]) -> dict[str, Any]:
    """Each flag of ``extra`` by its name in Megatron's arguments, with its first value. A switch is True."""
    return {name.replace("-", "_"): given[0] if given else True for name, given, _ in _grouped(extra)}


def _grouped(words: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each flag: its name, its values, and its words as they are written."""
    if words and not words[0].startswith("--"):
        raise LionError(f"{words[0]!r} after -- is not a flag: write --FLAG VALUE")
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        name, equals, value = words[start].removeprefix("--").partition("=")
        values = words[start + 1 : end]
        yield name, [value, *values] if equals else values, words[start:end]


def _check_name(name: str) -> None:
    known = known_flags()
    if known and name not in known:
        raise LionError(
            f"unknown flag --{name} after --: {hint(name, known)}launch/pretrain_gpt.py --help lists Megatron's flags"
        )


def known_flags() -> frozenset[str]:
    """Names of the flags in the source of the Megatron that a run would import; empty if there is none here.

    They are read from the text of its files, because importing Megatron takes ten seconds and may fail on a login node.
    Flags are written out in the text (``BooleanOptionalAction`` adds ``--no-FLAG``), or made from the fields of classes
    named Config (``--FIELD``; ``--no-FIELD`` and ``--disable-FIELD`` if the default is True). So the result has every
    flag of the parser, and some names that are not flags.
    """
    megatron = _folder()
    return frozenset() if megatron is None else _flags_in(megatron)


@functools.cache
def _flags_in(megatron: Path) -> frozenset[str]:
    names: set[str] = set()
    for path in [*megatron.rglob("*.py"), *OURS.rglob("*.py")]:
        text = path.read_text(encoding="utf-8", errors="replace")
        if "--" not in text and "Config" not in text:
            continue
        written = re.findall(r"""["']--([a-z0-9][\w-]*)["']""", text)
        names.update(written, (f"no-{name}" for name in written))
        if re.search(r"^class \w*Config\b", text, re.MULTILINE):
            fields = [field.replace("_", "-") for field in re.findall(r"^    ([a-z]\w*) *:", text, re.MULTILINE)]
            names.update(fields, (f"{prefix}-{name}" for name in fields for prefix in ("no", "disable")))
    return frozenset(names)


def _folder() -> Path | None:
    """The folder ``megatron`` that has ``megatron.training``, found without importing it."""
    try:
        found = importlib.util.find_spec("megatron.training")
    except ImportError:
        return None
    return Path(found.origin).parents[1] if found and found.origin else None
