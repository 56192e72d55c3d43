#!/usr/bin/env python3
"""Zero-shot perplexity of Megatron GPT checkpoints on WikiText-103, or on any text: a table like the paper's A1.

    torchrun --nproc-per-node 4 tools/eval_wikitext103.py --checkpoints runs/gpt2-small-lion --steps all \\
        --text wiki.test.tokens --output lion.json --tensor-model-parallel-size 2 --micro-batch-size 8

Every argument that decides the model's function comes from the checkpoint. So does its tokenizer, unless you pass other
paths. The layout, the precision and the machine come from Megatron's own flags, which all work here. A checkpoint may
be evaluated in any layout (pipeline stages without interleaving).

Every token except the first is scored exactly once, in windows that overlap. Padded rows of the vocabulary are excluded
from the softmax. Sums are float64. --output is updated after each step, and the same command resumes from it; a file
with results of another checkpoint, text or precision is refused. The paper's table A1 does not say of which perplexity
it has the logarithm, so both are printed.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from corpus.shards import write_json
from evaluation import checkpoints, windows

import megatron_lion
from megatron_lion.config import LionError
from megatron_lion.integration.cpu import torch_cuda
from megatron_lion.run import readable_errors


def read_text(path: Path | None, detokenizer: str) -> tuple[str, dict[str, Any]]:
    """Return the text as the model reads it, and the counts of words and bytes; from the hub where ``path`` is None."""
    if path is None:
        original = "".join(_hub_lines())
    else:
        try:
            original = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise LionError(f"--text {path}: {error}; pass a readable UTF-8 text file") from error
    text = windows.DETOKENIZERS[detokenizer](original)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return text, {"words": windows.count_words(original), "bytes": len(text.encode("utf-8")), "sha256": digest}


def _hub_lines() -> list[str]:
    import datasets

    try:
        return list(datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="test")["text"])
    except Exception as error:  # the hub's client raises one of a dozen kinds, of several packages
        raise LionError(f"WikiText-103 cannot be loaded from the hub: {error}. Pass its file with --text") from error


def window_length(asked: int | None, args: Any) -> int:
    """The window's tokens: as asked, or the longest that the model can hold. Raises LionError beyond that."""
    longest = args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else args.seq_length
    if asked is not None and not 1 <= asked <= longest:
        raise LionError(f"--window {asked}: this model holds 1 to {longest} tokens")
    return asked or longest


def finished(output: Path | None, settings: dict[str, Any], prints: dict[str, str]) -> dict[str, Any]:
    """Return the results that ``output`` has already.

    Raises LionError if they were made with other settings, or from another checkpoint of the same step, by the
    fingerprints in ``prints``.
    """
    if output is None or not output.exists():
        return {}
    try:
        content = json.loads(output.read_text(encoding="utf-8"))
        old, results = content["settings"], dict(content["results"])
    except (ValueError, KeyError, TypeError) as error:
        raise LionError(f"--output {output} was not written by this tool ({error!r}): use another name") from error
    if changed := sorted(name for name in settings.keys() | old.keys() if settings.get(name) != old.get(name)):
        raise LionError(f"--output {output} was made with another {', '.join(changed)}: use another name")
    for step in prints.keys() & results.keys():
        if results[step].get("checkpoint") != prints[step]:
            raise LionError(
                f"--output {output} was made from another checkpoint of iteration {step} than the one that is there "
                "now: use another name"
            )
    return results


def evaluate(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Score every step that ``options`` asks for and return what goes to --output. Run by every rank."""
    torch_cuda.require_device()
    steps = checkpoints.find_steps(options.checkpoints, options.steps)
    for step in steps:
        checkpoints.require_gpt(checkpoints.iteration_folder(options.checkpoints, step))
    text, counts = read_text(options.text, options.detokenizer)
    megatron_lion.register()
    import megatron.training.training as training  # its initialize_megatron may have been told to do without CUDA
    import torch
    from corpus.tokenizers import options_from
    from evaluation import model_args, scoring

    saved = checkpoints.read_args(checkpoints.iteration_folder(options.checkpoints, steps[0]))
    args = scoring.megatron_args(argv, options.checkpoints, steps[0], saved)
    length = window_length(options.window, args)
    tokenizer = options_from(args).build()
    if tokenizer.vocab_size > args.padded_vocab_size:
        raise LionError(
            f"the tokenizer has {tokenizer.vocab_size} entries and the model {args.padded_vocab_size} rows: it is not "
            "the one that the model was trained with"
        )
    tokens = torch.tensor(tokenizer.tokenize(text), dtype=torch.int64)
    settings = {
        "text_sha256": counts.pop("sha256"),
        "detokenizer": options.detokenizer,
        "tokenizer_sha256": options_from(args).sha256(),
        "window": length,
        "overlapping_eval": options.overlapping_eval,
        "raw_logits": options.raw_logits,
        "tokens": len(tokens),
        **counts,
        "checkpoints": str(options.checkpoints.resolve()),
        **model_args.arithmetic(args),
    }
    prints = {
        str(step): checkpoints.fingerprint(checkpoints.iteration_folder(options.checkpoints, step)) for step in steps
    }
    results = finished(options.output, settings, prints)
    cut = windows.make_windows(len(tokens), length, options.overlapping_eval)
    training.initialize_megatron()
    model = scoring.build_model(args)
    for step in steps:
        if str(step) in results:
            continue
        scoring.load_weights(model, args, step)
        nll, scored = scoring.score(
            model,
            tokens,
            cut,
            length=length,
            micro_batch=args.micro_batch_size,
            vocab_size=None if options.raw_logits else tokenizer.vocab_size,
        )
        if scored != len(tokens) - 1:
            raise LionError(f"{scored} tokens were scored, not {len(tokens) - 1}: please report this, it is a defect")
        results[str(step)] = {
            **windows.figures(nll, tokens=len(tokens), words=counts["words"], size=counts["bytes"]),
            "checkpoint": prints[str(step)],
        }
        content = {"settings": settings, "formulas": windows.FORMULAS, "results": results}
        if torch.distributed.get_rank() == 0 and options.output is not None:
            write_json(options.output, content)
    torch.distributed.barrier()
    return {"settings": settings, "results": {str(step): results[str(step)] for step in steps}, "rank": args.rank}


def report(content: dict[str, Any]) -> None:
    """Print the table, the counts behind it and what each column means."""
    settings = content["settings"]
    print(windows.table(content["results"]))
    print("\n{tokens:,} tokens, {words:,} words, {bytes:,} bytes; ".format(**settings), end="")
    print(f"{(settings['tokens'] - 1) / max(settings['words'] - 1, 1):.4f} tokens to a word")
    for name in ("perplexity", "word_perplexity", "bits_per_byte", "nll", "tokens", "words", "bytes"):
        print(f"  {name} = {windows.FORMULAS[name]}")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This tool's own flags, and what is left for Megatron."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoints", type=Path, required=True, metavar="DIR", help="a run's --save folder")
    add(
        "--steps",
        default="all",
        metavar="STEPS",
        help="all, latest, or numbers such as 10000,20000 (default: %(default)s)",
    )
    add("--text", type=Path, metavar="FILE", help="WikiText-103's test tokens or any text (default: from the hub)")
    add(
        "--detokenizer",
        choices=sorted(windows.DETOKENIZERS),
        default="wikitext",
        help="none for ordinary text (default: %(default)s)",
    )
    add("--window", type=int, metavar="N", help="tokens in a window (default: the longest the model holds)")
    add(
        "--overlapping-eval",
        type=int,
        default=32,
        metavar="N",
        help="a window begins N tokens after the last (default: %(default)s)",
    )
    add("--raw-logits", action="store_true", help="include padded rows of the vocabulary in the softmax")
    add("--output", type=Path, metavar="FILE", help="JSON results, updated after each step; rerun to resume")
    return parser.parse_known_args(arguments)


def main() -> None:
    """Run the command line, on every rank."""
    options, argv = parse(sys.argv[1:])
    content = evaluate(options, argv)
    if content["rank"] == 0:
        report(content)


if __name__ == "__main__":
    with readable_errors():
        main()
