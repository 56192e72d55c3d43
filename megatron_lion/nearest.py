"""Suggestions for misspelled names."""

import difflib
import re
from collections.abc import Iterable


def nearest_names(value: str, valid: Iterable[str]) -> list[str]:
    """Up to three of ``valid``: the shortest with all words of ``value``, else those spelled most like it."""
    names, words = sorted(valid), _words(value)
    extra = {name: len(_words(name) - words) for name in names if words and words <= _words(name)}
    shortest = [name for name, count in extra.items() if count == min(extra.values())]
    if 0 < len(shortest) <= 3:
        return shortest
    nearest = difflib.get_close_matches(value, names, n=3)
    scores = [difflib.SequenceMatcher(None, name, value).ratio() for name in nearest]
    return [name for name, score in zip(nearest, scores, strict=True) if score > scores[0] - 0.05]


def _words(name: str) -> set[str]:
    return set(re.findall(r"[^-_]+", name))


def hint(value: str, valid: Iterable[str]) -> str:
    """``did you mean 'lion'? ``, with the space, or nothing if no name of ``valid`` is similar to ``value``."""
    nearest = nearest_names(value, valid)
    return f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""


def did_you_mean(value: str, valid: Iterable[str]) -> str:
    """A sentence naming the nearest valid name, then all of them: ``did you mean 'lion'? Valid: adam, lion, sgd``."""
    names = sorted(valid)
    return f"{hint(value, names)}Valid: {', '.join(names)}"
