"""Every model x optimizer x cluster, and the golden file of their command lines.

python tests/launch/recipe_cases.py > tests/launch/golden.txt      after a change that was meant
"""

import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.txt")
sys.path.insert(0, str(ROOT / "launch"))

import commands  # noqa: E402
import estimates  # noqa: E402, F401
import recipe_checks  # noqa: E402
import recipes  # noqa: E402
import step_line  # noqa: E402, F401

import launch  # noqa: E402, F401

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
    """``model optimizer cluster: line`` for each case, with paths relative to the checkout and the current folder."""
    lines = [f"{' '.join(case)}: {commands.printed(recipe(*case), []).splitlines()[-1]}" for case in CASES]
    return [line.replace(f"{ROOT}/", "").replace(f"{Path.cwd()}/", "") for line in lines]


if __name__ == "__main__":
    print("\n".join(golden_lines()))
