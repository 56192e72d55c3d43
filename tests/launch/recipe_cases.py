"""Every model x optimizer x cluster, and the golden file of their command lines.

PYTHONPATH=launch python tests/launch/recipe_cases.py > tests/launch/golden.txt      after a change that was meant
"""

import itertools
from pathlib import Path

from launcher import commands, estimates, progress_line, recipe_checks, recipes  # noqa: F401

import launch  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.txt")

MODELS, OPTIMIZERS, CLUSTERS = (recipes.known(kind).split(", ") for kind in recipes.KINDS)
CASES = list(itertools.product(MODELS, OPTIMIZERS, CLUSTERS))
# What a combination needs to be changed so that it fits its machine; empty for all that the paper ran.
OVERRIDES = {
    **{
        (model, "cpu"): ["micro-batch-size=1", "gpu-memory-gib=16"]
        for model in ("gpt2_small", "gpt2_medium", "bert_base")
    },
    **{(model, "a100x16"): ["global-batch-size=64"] for model in ("tiny_gpt", "tiny_bert")},
    **{(model, "h100x8"): ["global-batch-size=32"] for model in ("tiny_gpt", "tiny_bert")},
}


def recipe(model: str, optimizer: str, cluster: str, *overrides: str) -> recipes.Recipe:
    """Resolved and checked, as launch.py does it."""
    found = recipes.resolve(model, optimizer, cluster, [*OVERRIDES.get((model, cluster), []), *overrides])
    recipe_checks.check(found)
    return found


def golden_lines() -> list[str]:
    """``model optimizer cluster: line`` for each case."""
    return [f"{' '.join(case)}: {commands.printed(recipe(*case), []).splitlines()[-1]}" for case in CASES]


if __name__ == "__main__":
    print("\n".join(golden_lines()))
