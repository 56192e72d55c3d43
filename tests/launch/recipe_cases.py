"""Every model x optimizer x cluster, and the golden file of a few command lines.

python -m tests.launch.recipe_cases > tests/launch/golden.txt      after a change that was meant
"""

import itertools
from pathlib import Path

from launch.launcher import commands, recipe_checks, recipes

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.txt")

MODELS = ("bert_base", "bert_small", "gpt2_medium", "gpt2_small", "tiny_bert", "tiny_gpt")
OPTIMIZERS = ("adam", "lion", "sgd", "sgd_no_momentum")
CLUSTERS = ("a100x16", "cpu", "h100x8", "one_gpu")
CASES = list(itertools.product(MODELS, OPTIMIZERS, CLUSTERS))
# Each model, optimizer and cluster at least once. The other lines are tested by their properties.
GOLDEN_CASES = (
    ("gpt2_small", "lion", "a100x16"),
    ("gpt2_medium", "sgd", "h100x8"),
    ("bert_base", "sgd_no_momentum", "a100x16"),
    ("bert_small", "adam", "one_gpu"),
    ("tiny_gpt", "lion", "cpu"),
    ("tiny_bert", "sgd", "cpu"),
)
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
    """``model optimizer cluster: line`` for each golden case; paths are relative."""
    lines = [f"{' '.join(case)}: {commands.printed(recipe(*case), []).splitlines()[-1]}" for case in GOLDEN_CASES]
    return [line.replace(f"{ROOT}/", "").replace(f"{Path.cwd()}/", "") for line in lines]


if __name__ == "__main__":
    print("\n".join(golden_lines()))
