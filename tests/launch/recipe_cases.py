"""Every model x optimizer x cluster, and the golden file of a few command lines.

python -m tests.launch.recipe_cases > tests/launch/golden.txt      after a change that was meant
"""

from pathlib import Path

from launch.launcher import commands, recipe_checks, recipes

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.txt")

PAPER = ("lion_paper", "sgd_paper", "sgd_paper_no_momentum")
# The optimizers that a model has rates for.
PAIRS = {
    "bert_base": ("adamw", *PAPER),
    "bert_small": ("adamw", *PAPER),
    "gpt2_medium": ("adamw", "lion", *PAPER),
    "gpt2_small": ("adamw", "lion", *PAPER),
    "llama_130m": ("adamw", "lion"),
    "llama_1b": ("adamw", "lion"),
    "llama_300m": ("adamw", "lion"),
    "llama_520m": ("adamw", "lion"),
    "llama_7b": ("adamw", "lion"),
    "tiny_bert": ("adamw", "lion", "sgd", "sgd_paper_no_momentum"),
    "tiny_gpt": ("adamw", "lion", "sgd", "sgd_paper_no_momentum"),
}
MODELS = tuple(PAIRS)
OPTIMIZERS = ("adamw", "lion", "lion_paper", "sgd", "sgd_paper", "sgd_paper_no_momentum")
CLUSTERS = ("a100x16", "cpu", "h100x32", "h100x8", "one_gpu")
CASES = [
    (model, optimizer, cluster)
    for model, optimizers in PAIRS.items()
    for optimizer in optimizers
    for cluster in CLUSTERS
    if (model, cluster) != ("llama_7b", "one_gpu")  # it needs two
]
# Each model, optimizer and cluster at least once. The other lines are tested by their properties.
GOLDEN_CASES = (
    ("gpt2_small", "lion", "h100x8"),
    ("gpt2_small", "lion_paper", "a100x16"),
    ("gpt2_medium", "sgd_paper", "h100x8"),
    ("llama_7b", "lion", "h100x32"),
    ("llama_520m", "adamw", "h100x8"),
    ("bert_base", "sgd_paper_no_momentum", "a100x16"),
    ("bert_small", "adamw", "one_gpu"),
    ("tiny_gpt", "lion", "cpu"),
    ("tiny_bert", "sgd", "cpu"),
)
# What a combination needs to be changed so that it fits its machine; empty for all that is meant for it.
ONE_SEQUENCE, LARGE = "micro-batch-size=1", "gpu-memory-gib=200"
OVERRIDES = {
    **{(model, "cpu"): [ONE_SEQUENCE, LARGE] for model in MODELS if not model.startswith("tiny")},
    **{(model, "a100x16"): ["global-batch-size=64"] for model in ("tiny_gpt", "tiny_bert")},
    **{(model, "h100x8"): ["global-batch-size=32"] for model in ("tiny_gpt", "tiny_bert")},
    **{(model, "h100x32"): ["global-batch-size=128"] for model in ("tiny_gpt", "tiny_bert")},
    **{(model, "h100x32"): ["micro-batch-size=4"] for model in ("gpt2_small", "bert_small", "bert_base")},
    ("llama_300m", "one_gpu"): [ONE_SEQUENCE],
    ("llama_520m", "one_gpu"): [ONE_SEQUENCE],
    ("llama_1b", "one_gpu"): [ONE_SEQUENCE, LARGE],
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
