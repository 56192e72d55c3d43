"""The recipes in the Megatron that is installed: its own parser and validation, its count of FLOPs, its models."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.launcher import commands, estimates, extra_flags, keys, recipes
from megatron_lion.integration.cpu import run_flags
from tests.harness import run_ranks
from tests.launch.recipe_cases import CASES, recipe

# Switches that Megatron keeps under another name, and whether they are turned round.
RENAMED = {
    "no-masked-softmax-fusion": ("masked_softmax_fusion", True),
    "no-rope-fusion": ("apply_rope_fusion", True),
    "no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", True),
    "disable-bias-linear": ("add_bias_linear", True),
    "norm-epsilon": ("layernorm_epsilon", False),
}
SIZES = {"hidden": 64, "heads": 4, "vocabulary": 256, "positions": 32}
COUNTED = [
    {"bert": bert, "llama": llama, "layers": layers, **SIZES}
    for bert, llama in ((True, False), (False, False), (False, True))
    for layers in (1, 3)
]


ON_A_CPU = {name for name, _ in run_flags.SETTINGS.values()}


@pytest.fixture(scope="module")
def found() -> list[recipes.Recipe]:
    """Every case, resolved."""
    return [recipe(*case) for case in CASES]


@pytest.fixture(scope="module")
def answers(found: list[recipes.Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Megatron's flags, its arguments for every case, and its models' parameters, from one process."""
    folder = tmp_path_factory.mktemp("answers")
    lines = [(one.ranks, estimates.padded_vocabulary(one), commands.training_flags(one, [])) for one in found]
    files = {"ASKED": folder / "asked.json", "ANSWERS": folder / "answers.json"}
    files["ASKED"].write_text(json.dumps({"lines": lines, "models": COUNTED}))
    environment = {name: str(path) for name, path in files.items()}
    run = run_ranks(script=Path(__file__).with_name("parse_recipes.py"), environment=environment)
    assert run.returncode == 0, run.output[-3000:]
    answers: dict[str, Any] = json.loads(files["ANSWERS"].read_text())
    return answers


def test_megatron_takes_every_recipe_and_keeps_every_value(
    found: list[recipes.Recipe], answers: dict[str, Any]
) -> None:
    for case, one, answer in zip(CASES, found, answers["outcomes"], strict=True):
        assert "refused" not in answer, f"{case}: {answer}"
        for key in keys.MEGATRON_KEYS.keys() & one.settings.keys():
            if key.startswith("norm-ratio") and not one.get("norm-ratio-interval"):
                continue  # not on the command line
            name, is_turned = RENAMED.get(key, (key.replace("-", "_"), False))
            if name in ON_A_CPU:
                continue  # replaced on the parsing rank, which has no GPU
            kept = answer[name]
            kept = kept[0] if isinstance(kept, list) else not kept if is_turned else kept
            assert kept == one[key], f"{case}: --{key} {one[key]} became {kept}"


def test_the_flops_are_megatrons_own_count(found: list[recipes.Recipe], answers: dict[str, Any]) -> None:
    for case, one, answer in zip(CASES, found, answers["outcomes"], strict=True):
        assert estimates.flops_per_step(one) == pytest.approx(answer["flops"], rel=1e-12), case


def test_the_parameters_are_those_of_megatrons_models(answers: dict[str, Any]) -> None:
    for model, count in zip(COUNTED, answers["counts"], strict=True):
        sizes = {"num-layers": model["layers"], "hidden-size": 64, "num-attention-heads": 4, "vocab-size": 256}
        sizes |= {"max-position-embeddings": 32, "seq-length": 32}
        if model["llama"]:
            sizes |= {"group-query-attention": "true", "num-query-groups": 2, "ffn-hidden-size": 192}
        name = "tiny_bert" if model["bert"] else "llama_130m" if model["llama"] else "tiny_gpt"
        found = recipe(name, "lion", "cpu", *(f"{key}={value}" for key, value in sizes.items()))
        assert estimates.parameters(found) == [count]


def test_every_key_of_a_recipe_is_a_flag_of_megatrons(answers: dict[str, Any]) -> None:
    """Those that no file in configs/ sets, too."""
    assert [key for key in keys.MEGATRON_KEYS if f"--{key}" not in answers["flags"]] == []


def test_every_flag_of_megatrons_is_known_without_importing_it(answers: dict[str, Any]) -> None:
    """So that no flag after -- is refused that Megatron has."""
    known = extra_flags.known_flags()
    assert {flag for flag in answers["flags"] if flag.removeprefix("--") not in known} <= {"-h", "--help"}
