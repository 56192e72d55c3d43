"""Flags after ``--``: a recipe's own keys become overrides, the names of all others are checked."""

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_lion.config import LionError, did_you_mean

from .keys import MEGATRON_KEYS
from .recipe_files import ROOT

OURS = ROOT / "megatron_lion" / "integration"


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The ``key=value`` overrides among the words after ``--``, and the words that Megatron gets as they are.

    Raises LionError for a flag that the installed Megatron does not have, without starting it.
    """
    overrides: list[str] = []
    extra: list[str] = []
    for flag, values in _grouped(words):
        name, equals, value = flag.removeprefix("--").partition("=")
        given = [value, *values] if equals else values
        if name not in MEGATRON_KEYS:
            _check_name(name)
            extra += [flag, *values]
        elif MEGATRON_KEYS[name] is bool and not given:
            overrides.append(f"{name}=true")
        elif MEGATRON_KEYS[name] is not bool and len(given) == 1:
            overrides.append(f"{name}={given[0]}")
        else:
            allowed = "no value" if MEGATRON_KEYS[name] is bool else "one value"
            raise LionError(f"--{name} after -- takes {allowed}, got {' '.join(given) or 'none'}")
    return overrides, extra


def _grouped(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words up to the next one."""
    if words and not words[0].startswith("--"):
        raise LionError(f"{words[0]!r} after -- is not a flag: write --FLAG VALUE")
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        yield words[start], words[start + 1 : end]


def _check_name(name: str) -> None:
    known = known_flags()
    if known and name not in known:
        suggestion = did_you_mean(name, known).partition("Valid:")[0].strip()
        raise LionError(
            f"unknown flag --{name} after --: {suggestion or 'no flag has a similar name.'} launch/pretrain_gpt.py "
            "--help lists Megatron's flags"
        )


def known_flags() -> frozenset[str]:
    """Names of the flags in the source of the Megatron that a run would import; empty if there is none here.

    They are read from the text of its files: importing Megatron takes ten seconds, and may not be possible on a login
    node. Flags are written out in the text, or made from the fields of configuration classes (``--no-FIELD`` and
    ``--disable-FIELD`` for those that are on), so this is a superset of the parser's.
    """
    megatron = _folder()
    if megatron is None:
        return frozenset()
    names: set[str] = set()
    for path in [*megatron.glob("training/**/*.py"), *OURS.rglob("*.py")]:
        names.update(re.findall(r"""["']--([a-z0-9][\w-]*)["']""", path.read_text(encoding="utf-8", errors="replace")))
    for path in megatron.rglob("*config*.py"):
        fields = re.findall(r"^    ([a-z]\w*) *:", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        for field in fields:
            name = field.replace("_", "-")
            names.update((name, f"no-{name}", f"disable-{name}"))
    return frozenset(names)


def _folder() -> Path | None:
    """The folder ``megatron`` that has ``megatron.training``, found without importing it."""
    try:
        found = importlib.util.find_spec("megatron.training")
    except ImportError:
        return None
    return Path(found.origin).parents[1] if found and found.origin else None
