"""``launch.py ... --rehearse``: build ranks of a recipe's run on this machine, without a GPU."""

import json
import os
from typing import Any

from . import commands, estimates, recipe_checks
from .recipe_files import ROOT
from .recipes import Recipe

# Dropped if their files are not on this machine: the tokenizer only sets the size of the vocabulary.
TOKENIZER_KEYS = ("tokenizer-type", "tokenizer-model", "vocab-file", "merge-file")


def run(recipe: Recipe, extra: list[str], words: list[str] | None = None) -> int:
    """Rehearse ``recipe`` and compare it with its estimate. Returns ``megatron-lion rehearse``'s exit status.

    ``words`` are further options of ``megatron-lion rehearse``.
    """
    from megatron_lion.cli.rehearse import main

    os.environ.update(recipe.environment)
    line = ["--world-size", str(recipe.ranks), "--gpu-memory", str(recipe["gpu-memory-gib"])]
    line += ["--estimate", json.dumps(_estimate(recipe)), *(words or [])]
    return main([*line, str(ROOT / "launch" / recipe["script"]), *flags(recipe, extra)])


def flags(recipe: Recipe, extra: list[str]) -> list[str]:
    """The script's flags, with NullTokenizer if the recipe's tokenizer files are not on this machine."""
    absent = [entry.partition(":")[0] for entry in recipe_checks.missing_files(recipe)]
    if not any(key in absent for key in TOKENIZER_KEYS):
        return commands.training_flags(recipe, extra)
    words = recipe["vocab-size"]
    print(f"{', '.join(absent)} are not on this machine: rehearsing with NullTokenizer, {words:,} words, no data")
    words = null_tokenizer_size(words)
    settings: dict[str, Any] = {key: value for key, value in recipe.settings.items() if key not in TOKENIZER_KEYS}
    settings |= {"tokenizer-type": "NullTokenizer"}
    numbered = Recipe(names=recipe.names, settings=settings, environment=recipe.environment)
    return commands.training_flags(numbered, [*extra, "--vocab-size", str(words)])


def null_tokenizer_size(words: int) -> int:
    """``--vocab-size`` for a NullTokenizer of ``words`` words. That of megatron-core 0.17 adds one."""
    from megatron_lion.integration.compat.versions import minor_version

    return words - (minor_version() < "0.18")


def _estimate(recipe: Recipe) -> dict[str, int]:
    needed = estimates.memory(recipe)
    return {"weights": needed.weights, "gradients": needed.gradients, "state": needed.state}
