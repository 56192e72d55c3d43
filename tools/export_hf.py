#!/usr/bin/env python3
"""Turn a GPT checkpoint of Megatron into a Hugging Face GPT2LMHeadModel folder.

    python tools/export_hf.py --checkpoints runs/gpt2-small-lion --step latest --output exported/gpt2-small-lion

It reads a torch_dist checkpoint of any layout, without ranks and without building the model. It writes config.json,
model.safetensors and, for GPT-2's tokenizer, the tokenizer's files. Padded rows of the vocabulary are dropped. Settings
that GPT-2 does not have are refused: rotary positions, RMSNorm, gated or other activations, grouped queries, experts,
linear layers without bias, and any other argument that makes another function.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from corpus.tokenizers import TokenizerOptions
from corpus.tokenizers import add_arguments as add_tokenizer_arguments
from evaluation import checkpoints, model_args
from evaluation.scoring import chosen_tokenizer

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors

# Settings that GPT2LMHeadModel can express although they are not Megatron's defaults, or that do not change the
# function.
EXPRESSED = (
    "num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size", "max_position_embeddings",
    "layernorm_epsilon", "bias_gelu_fusion", "untie_embeddings_and_output_weights", "group_query_attention",
    "num_query_groups", "add_qkv_bias", "attention_softmax_in_fp32", "apply_query_key_layer_scaling",
)  # fmt: skip
# Megatron's name in every layer and GPT-2's; GPT-2's Conv1D keeps linear weights as [in, out].
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "ln_1.weight",
    "self_attention.linear_qkv.layer_norm_bias": "ln_1.bias",
    "self_attention.linear_qkv.weight": "attn.c_attn.weight",
    "self_attention.linear_qkv.bias": "attn.c_attn.bias",
    "self_attention.linear_proj.weight": "attn.c_proj.weight",
    "self_attention.linear_proj.bias": "attn.c_proj.bias",
    "mlp.linear_fc1.layer_norm_weight": "ln_2.weight",
    "mlp.linear_fc1.layer_norm_bias": "ln_2.bias",
    "mlp.linear_fc1.weight": "mlp.c_fc.weight",
    "mlp.linear_fc1.bias": "mlp.c_fc.bias",
    "mlp.linear_fc2.weight": "mlp.c_proj.weight",
    "mlp.linear_fc2.bias": "mlp.c_proj.bias",
}


def require_gpt2(args: Any) -> None:
    """Raise LionError listing everything in the model that GPT-2 does not have.

    Megatron's default GPT is GPT-2, so every argument that decides a model's function must have its default, but for
    ``EXPRESSED``.
    """
    usual = model_args.default_args()
    wrong = [
        f"{name} is {getattr(args, name)} (GPT-2: {getattr(usual, name, None)})"
        for name in model_args.function_args(args)
        if name not in EXPRESSED and getattr(args, name) != getattr(usual, name, None)
    ]
    if (args.num_query_groups or args.num_attention_heads) != args.num_attention_heads and args.group_query_attention:
        wrong.append(f"{args.num_query_groups} query groups for {args.num_attention_heads} heads")
    if args.kv_channels * args.num_attention_heads != args.hidden_size:
        wrong.append(f"heads of {args.kv_channels} channels (GPT-2: {args.hidden_size // args.num_attention_heads})")
    if wrong:
        raise LionError(f"GPT2LMHeadModel cannot express this model: {'; '.join(wrong)}")


def gpt2_config(args: Any, vocab_size: int, eod: int) -> dict[str, Any]:
    """Return the content of config.json.

    Megatron's GELU is the tanh formula where its bias is fused in (fusions/fused_bias_gelu 13) and the error function
    elsewhere (mlp 291): "gelu_new" and "gelu" here.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": args.max_position_embeddings,
        "n_embd": args.hidden_size,
        "n_layer": args.num_layers,
        "n_head": args.num_attention_heads,
        "n_inner": args.ffn_hidden_size,
        "activation_function": "gelu_new" if args.bias_gelu_fusion else "gelu",
        "layer_norm_epsilon": args.layernorm_epsilon,
        "resid_pdrop": args.hidden_dropout,
        "embd_pdrop": args.hidden_dropout,
        "attn_pdrop": args.attention_dropout,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "torch_dtype": "float32",
    }


def split_heads(tensor: Any, heads: int) -> Any:
    """Reorder a fused QKV weight or bias: [heads, (q, k, v), channels, ...] to [(q, k, v), heads, channels, ...].

    Megatron keeps each head's q, k and v together, so that tensor parallelism cuts between heads.
    """
    inner = tensor.shape[1:]
    return tensor.view(heads, 3, -1, *inner).transpose(0, 1).reshape(tensor.shape)


def gpt2_tensors(checkpoint: Path, args: Any, vocab_size: int) -> dict[str, Any]:
    """Return GPT2LMHeadModel's tensors, in fp32. Raises LionError where the checkpoint lacks one of them."""
    tied = not args.untie_embeddings_and_output_weights
    # Megatron stacks equal layers along a first axis, or with --non-homogeneous-layers numbers them in the key.
    stacked = "decoder.layers.self_attention.linear_qkv.weight" in checkpoints.tensor_sizes(checkpoint)
    whole = {
        "embedding.word_embeddings.weight": "transformer.wte.weight",
        "embedding.position_embeddings.weight": "transformer.wpe.weight",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    }
    if not tied:
        whole["output_layer.weight"] = "lm_head.weight"
    numbers = [""] if stacked else [f"{number}." for number in range(args.num_layers)]
    read = checkpoints.read_tensors(
        checkpoint, [*whole, *(f"decoder.layers.{number}{name}" for number in numbers for name in LAYER)]
    )
    tensors = {ours: read[name].float() for name, ours in whole.items()}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:vocab_size]
    for layer in range(args.num_layers):
        for name, ours in LAYER.items():
            tensor = (
                read[f"decoder.layers.{name}"][layer] if stacked else read[f"decoder.layers.{layer}.{name}"]
            ).float()
            if "linear_qkv" in name and "layer_norm" not in name:
                tensor = split_heads(tensor, args.num_attention_heads)
            tensors[f"transformer.h.{layer}.{ours}"] = tensor.t() if tensor.dim() == 2 else tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_tokenizer(folder: Path, tokenizer: TokenizerOptions) -> bool:
    """Copy GPT-2's vocabulary files into ``folder`` so that AutoTokenizer finds them; False for another tokenizer."""
    if tokenizer.tokenizer_type != "GPT2BPETokenizer":
        return False
    from megatron_lion.integration.loop.vocabularies import LOCAL

    description, names = LOCAL[tokenizer.tokenizer_type]
    for name, path in zip(names, tokenizer.files(), strict=True):
        (folder / name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(description) + "\n", encoding="utf-8")
    return True


def export(options: argparse.Namespace) -> None:
    """Write the folder that the command line asks for. If that is not possible, raises LionError and writes nothing."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise LionError("the export needs the package safetensors: pip install safetensors") from error
    if options.output.exists():
        raise LionError(f"--output {options.output} exists: use another folder, or remove it")
    (step, *more) = checkpoints.find_steps(options.checkpoints, options.step)
    if more:
        raise LionError(f"--step {options.step} names several: use one")
    checkpoint = checkpoints.iteration_folder(options.checkpoints, step)
    checkpoints.require_gpt(checkpoint)
    args = checkpoints.read_args(checkpoint)
    require_gpt2(args)
    chosen = TokenizerOptions(**chosen_tokenizer(options, args))
    tokenizer = chosen.build()
    if tokenizer.vocab_size > args.padded_vocab_size:
        raise LionError(f"the tokenizer has {tokenizer.vocab_size} entries, the model {args.padded_vocab_size} rows")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".partial-") as staging:
        folder = Path(staging) / "model"
        folder.mkdir()
        config = gpt2_config(args, tokenizer.vocab_size, tokenizer.eod)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(gpt2_tensors(checkpoint, args, tokenizer.vocab_size), folder / "model.safetensors", {"format": "pt"})
        with_tokenizer = write_tokenizer(folder, chosen)
        folder.rename(options.output)
    dropped = args.padded_vocab_size - tokenizer.vocab_size
    print(f"{options.output}: iteration {step}, {tokenizer.vocab_size:,} tokens ({dropped} rows of padding dropped)")
    if not with_tokenizer:
        print(f"  without a tokenizer: {chosen.tokenizer_type} is not GPT-2's; use {chosen.files()[0]} with it")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoints", type=Path, required=True, metavar="DIR", help="a run's --save folder")
    add("--step", default="latest", metavar="N", help="the iteration to export (default: %(default)s)")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    add_tokenizer_arguments(parser)
    export(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
