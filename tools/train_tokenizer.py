#!/usr/bin/env python3
"""Train a vocabulary from your own text. Megatron reads the files as they are.

    python tools/train_tokenizer.py --input text/*.jsonl --tokenizer-type GPT2BPETokenizer --vocab-size 50257 \\
        --output vocab

    --tokenizer-type             leaves in --output                     Megatron's flags
    GPT2BPETokenizer             vocab.json, merges.txt                 --vocab-file, --merge-file
    BertWordPieceLowerCase/Case  vocab.txt                              --vocab-file
    SentencePieceTokenizer       tokenizer.model                        --tokenizer-model

The same text, read in the same order, gives the same files. Nothing is overwritten.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from corpus import shards, sources
from corpus.vocabularies import FILES, train

from megatron_lion.run import readable_errors


def documents(found: list[sources.Source], key: str, megabytes: float) -> Iterator[str]:
    """Yield documents until ``megabytes`` of them are out; bad units are left out."""
    budget = megabytes * 1e6
    for source in found:
        for unit in source.units(source):
            try:
                text = shards.document_text(unit, source.kind, key)
            except shards.BadUnit:
                continue
            budget -= len(unit)
            if budget < 0:
                return
            yield text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="as tools/prepare_text.py takes them")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the vocabulary's files")
    add("--tokenizer-type", choices=FILES, required=True, help="Megatron's name of the tokenizer")
    add("--vocab-size", type=int, required=True, metavar="N", help="entries, special tokens included")
    add(
        "--max-megabytes",
        type=float,
        default=256.0,
        metavar="N",
        help="text to train on, from the start (default: %(default)s)",
    )
    sources.add_arguments(parser)
    args = parser.parse_args(arguments)
    found = sources.find_sources(
        args.input, key=args.json_keys, documents=args.text_documents, dataset_split=args.dataset_split
    )
    texts = documents(found, args.json_keys, args.max_megabytes)
    flags = train(args.tokenizer_type, texts, args.vocab_size, args.output)
    print(
        f"--tokenizer-type {args.tokenizer_type} "
        + " ".join(f"{flag} {shlex.quote(str(path))}" for flag, path in flags.items())
    )
    return 0


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
