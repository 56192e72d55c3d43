"""The recipes in the Megatron that is installed: its own parser and validation, and its count of FLOPs."""

import json
import os
import subprocess
import sys

import pytest

from launch.launcher import commands, estimates, recipes
from tests.launch.recipe_cases import CASES, recipe

# Reads [ranks, line] pairs as JSON; answers each with what Megatron made of it.
PARSE = """
import argparse, json, os, sys
import megatron_lion

megatron_lion.register()
import torch
from megatron.core import parallel_state
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
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


def count(bert, layers, hidden, heads, vocabulary, positions):
    config = TransformerConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, use_cpu_initialization=True
    )
    shared = {"vocab_size": vocabulary, "max_sequence_length": positions, "share_embeddings_and_output_weights": True}
    if bert:
        model = BertModel(config, num_tokentypes=2, transformer_layer_spec=bert_layer_local_spec, **shared)
    else:
        model = GPTModel(config, transformer_layer_spec=get_gpt_layer_local_spec(), **shared)
    return sum(param.numel() for param in model.parameters())


asked = json.load(sys.stdin)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
counts = [count(*model) for model in asked["models"]]
outcomes = [outcome(ranks, padded, line) for ranks, padded, line in asked["lines"]]
print("ANSWERS", json.dumps({"flags": flags, "outcomes": outcomes, "counts": counts}))
"""
# Switches that Megatron keeps under another name, turned round.
TURNED = {
    "no-masked-softmax-fusion": "masked_softmax_fusion",
    "no-rope-fusion": "apply_rope_fusion",
    "no-gradient-accumulation-fusion": "gradient_accumulation_fusion",
}

# BERT or not, layers, hidden, heads, vocabulary rows, positions.
COUNTED = [(bert, layers, 64, 4, 256, 32) for bert in (True, False) for layers in (1, 3)]


@pytest.fixture(scope="module")
def answers() -> dict:
    """Megatron's flags, and its arguments for every case, from one process."""
    found = [recipe(*case) for case in CASES]
    asked = [(one.ranks, estimates.padded_vocabulary(one), commands.training_flags(one, [])) for one in found]
    environment = {**os.environ, "MEGATRON_LION_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input=json.dumps({"lines": asked, "models": COUNTED}),
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


def test_the_parameters_are_those_of_megatrons_models(answers: dict) -> None:
    for (bert, layers, hidden, heads, vocabulary, positions), count in zip(COUNTED, answers["counts"], strict=True):
        sizes = {"num-layers": layers, "hidden-size": hidden, "num-attention-heads": heads, "vocab-size": vocabulary}
        sizes |= {"max-position-embeddings": positions, "seq-length": positions}
        found = recipe("tiny_bert" if bert else "tiny_gpt", "lion", "cpu", *(f"{k}={v}" for k, v in sizes.items()))
        assert estimates.parameters(found) == [count]


def test_every_key_of_a_recipe_is_a_flag_of_megatrons(answers: dict) -> None:
    """Those that no file in configs/ sets, too."""
    assert [key for key in recipes.MEGATRON_KEYS if f"--{key}" not in answers["flags"]] == []
