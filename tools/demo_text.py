#!/usr/bin/env python3
"""Make a small training corpus for Megatron from text that every machine with Python has.

The text is Python's own documentation: its help topics and the docstrings of its standard library, or with --text plain
text files. It writes to --output

    tokenizer.model                        a SentencePiece tokenizer (BPE), trained on the training documents only
    {train,valid,test}_text_document.bin   the tokens of each split; Megatron's end-of-document token closes each text
    {train,valid,test}_text_document.idx   where each document begins
    manifest.json                          sizes, checksums, options; written last, so its presence means "complete"

A complete folder made with the same options and Python version is reused.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from corpus.small_corpus import PREFIX, TOKENIZER, prepare
from corpus.splits import SPLITS

from megatron_lion.config import LionError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the corpus")
    add("--vocab-size", type=int, default=2048, metavar="N", help="pieces in the tokenizer (default: %(default)s)")
    add("--max-megabytes", type=float, metavar="N", help="keep a sample of the text of at most N megabytes")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text, a blank line after each document")
    add("--force", action="store_true", help="rebuild a complete corpus (clear any --data-cache-path of it yourself)")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        prepare(**vars(args))
    except (LionError, OSError) as error:
        where = f"--output {args.output}: " if isinstance(error, OSError) else ""
        print(f"demo_text.py: error: {where}{error}", file=sys.stderr)
        return 2
    flags = {"--tokenizer-type": "SentencePieceTokenizer", "--tokenizer-model": str(args.output / TOKENIZER)}
    flags |= {f"--{split}-data-path": str(args.output / PREFIX.format(split)) for split in SPLITS}
    print(f"done in {time.monotonic() - start:.1f} s; to train on it, pass to Megatron")
    print("    " + " \\\n    ".join(map(shlex.join, flags.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
