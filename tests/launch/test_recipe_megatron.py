"""The recipes in the Megatron that is installed: its own parser and validation, and its count of FLOPs."""

import json
import os
import subprocess
import sys

import pytest
from recipe_cases import CASES, commands, estimates, recipe, recipes

# Reads [ranks, line] pairs as JSON; answers each with what Megatron made of it.
PARSE = """
import argparse, json, os, sys
import megatron_lion

megatron_lion.register()
from megatron.training import arguments
from megatron.training.training import num_floating_point_operations


def outcome(ranks, padded, line):
    os.environ["WORLD_SIZE"] = str(ranks)
    sys.argv = ["pretrain.py", *line]
    try:
        args = arguments.parse_args()
        arguments.validate_args(args)
    except (Exception, SystemExit) as error:
        return {"refused": repr(error)}
    args.padded_vocab_size = padded
    kept = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str, list))}
    return kept | {"flops": num_floating_point_operations(args, args.global_batch_size)}


parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
flags = [name for action in parser._actions for name in action.option_strings]
outcomes = [outcome(ranks, padded, line) for ranks, padded, line in json.load(sys.stdin)]
print("ANSWERS", json.dumps({"flags": flags, "outcomes": outcomes}))
"""
# Switches that Megatron keeps under another name, turned round.
TURNED = {
    "no-masked-softmax-fusion": "masked_softmax_fusion",
    "no-rope-fusion": "apply_rope_fusion",
    "no-gradient-accumulation-fusion": "gradient_accumulation_fusion",
}


@pytest.fixture(scope="module")
def answers() -> dict:
    """Megatron's flags, and its arguments for every case, from one process."""
    found = [recipe(*case) for case in CASES]
    asked = [(one.ranks, estimates.padded_vocabulary(one), commands.training_flags(one, [])) for one in found]
    environment = {**os.environ, "MEGATRON_LION_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("ANSWERS ")[-1])


def test_megatron_takes_every_recipe_and_keeps_every_value(answers: dict) -> None:
    for case, answer in zip(CASES, answers["outcomes"], strict=True):
        found = recipe(*case)
        assert "refused" not in answer, f"{case}: {answer}"
        for key in recipes.MEGATRON_KEYS.keys() & found.settings.keys():
            kept = answer[TURNED.get(key, key.replace("-", "_"))]
            kept = kept[0] if isinstance(kept, list) else not kept if key in TURNED else kept
            assert kept == found[key], f"{case}: --{key} {found[key]} became {kept}"


def test_the_flops_are_megatrons_own_count(answers: dict) -> None:
    for case, answer in zip(CASES, answers["outcomes"], strict=True):
        assert estimates.flops_per_step(recipe(*case)) == pytest.approx(answer["flops"], rel=1e-12), case


def test_every_key_of_a_recipe_is_a_flag_of_megatrons(answers: dict) -> None:
    """Those that no file in configs/ sets, too."""
    assert [key for key in recipes.MEGATRON_KEYS if f"--{key}" not in answers["flags"]] == []
