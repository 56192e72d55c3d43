"""Run as a rank: Megatron's own parser, validation, count of FLOPs and models for what ``test_recipe_megatron`` asks.

Reads JSON from the file ASKED: "lines", each [ranks, padded vocabulary, flags], and "models", keyword arguments of
``count``. Writes "flags", "outcomes" and "counts" to the file ANSWERS.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import megatron_lion

megatron_lion.register()
import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec  # noqa: E402
from megatron.core.models.bert.bert_model import BertModel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.training import arguments  # noqa: E402
from megatron.training.training import num_floating_point_operations  # noqa: E402


def outcome(ranks: int, padded: int, line: list[str]) -> dict[str, Any]:
    """What Megatron makes of a command line: its arguments and FLOPs, or why it refuses it."""
    os.environ["WORLD_SIZE"] = str(ranks)
    sys.argv = ["pretrain.py", *line]
    try:
        args = arguments.parse_args()
        arguments.validate_args(args)
    except (Exception, SystemExit) as error:
        return {"refused": repr(error)}
    args.padded_vocab_size = padded
    kept = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str | list)}
    return kept | {"flops": num_floating_point_operations(args, args.global_batch_size)}


def count(bert: bool, llama: bool, layers: int, hidden: int, heads: int, vocabulary: int, positions: int) -> int:
    """Parameters of Megatron's model."""
    sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    shared = {"vocab_size": vocabulary, "max_sequence_length": positions}
    if llama:
        config = TransformerConfig(
            **sizes, num_query_groups=heads // 2, ffn_hidden_size=3 * hidden, normalization="RMSNorm",
            gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
            use_cpu_initialization=True,
        )  # fmt: skip
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        untied = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope"}
        model = GPTModel(config, transformer_layer_spec=layer, **shared, **untied)
    else:
        config = TransformerConfig(**sizes, use_cpu_initialization=True)
        shared["share_embeddings_and_output_weights"] = True
        if bert:
            model = BertModel(config, num_tokentypes=2, transformer_layer_spec=bert_layer_local_spec, **shared)
        else:
            model = GPTModel(config, transformer_layer_spec=get_gpt_layer_local_spec(), **shared)
    return sum(param.numel() for param in model.parameters())


def main() -> None:
    # Megatron builds its parser of 850 flags for every line; one does for all of them.
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    arguments.add_megatron_arguments = lambda _: parser
    asked = json.loads(Path(os.environ["ASKED"]).read_text())
    outcomes = [outcome(*line) for line in asked["lines"]]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    counts = [count(**model) for model in asked["models"]]
    flags = [name for action in parser._actions for name in action.option_strings]
    Path(os.environ["ANSWERS"]).write_text(json.dumps({"flags": flags, "outcomes": outcomes, "counts": counts}))


if __name__ == "__main__":
    main()
