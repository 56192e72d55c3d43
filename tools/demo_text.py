#!/usr/bin/env python3
"""Make a small training corpus for Megatron out of text that every machine with Python already has.

The text is Python's own documentation: its help topics and the docstrings of its standard library; with --text,
plain text files take its place. Under --output it leaves

    tokenizer.model                        a SentencePiece tokenizer (BPE), trained on the training documents only
    {train,valid,test}_text_document.bin   the tokens of each split; Megatron's end-of-document token closes each text
    {train,valid,test}_text_document.idx   where each document begins
    manifest.json                          sizes, checksums, options; written last, so its presence means "complete"

A complete folder made with the same options and Python version is reused.
"""

import argparse
import ast
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpus.manifest import file_entry
from corpus.splits import SPLITS, digest_number, split_of
from corpus.tokenizers import TokenizerOptions
from train_tokenizer import train_sentencepiece

from megatron_lion.config import LionError

FORMAT = 1  # raise it when the same options would give other files, so that folders of older versions are rebuilt
SHARES = (18, 1, 1)  # of train, valid and test
PREFIX = "{}_text_document"  # less the folder, what --train-data-path and its kin take
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TOKENIZER_TRAINING_MEGABYTES = 32.0  # more changes a small vocabulary little, and costs memory and time
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
SHORTEST_DOCSTRING = 40  # characters; shorter ones ("Return self.") say the same thing in a thousand places
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def docstrings(source: bytes) -> list[str]:
    """Return the docstrings in a Python source file; none if this Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's string literals
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=True) for node in ast.walk(tree) if isinstance(node, documented))
    # A docstring may spell a lone surrogate, which UTF-8 cannot hold.
    return [text.encode("utf-8", "replace").decode("utf-8") for text in found if text]


def python_documents(folder: Path) -> list[str]:
    """Return Python's help topics and the docstrings of the sources under `folder`, which are parsed, not imported.

    Raises LionError where one of them is absent, as in a Python that ships only compiled files.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LionError(f"this Python has no help topics ({error}): give text with --text FILE") from error
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    names = [name for name in names if not SKIPPED_FOLDERS.intersection(name.parts)]
    found = [text for name in names for text in docstrings((folder / name).read_bytes())]
    if not found:
        raise LionError(f"no Python sources under {folder}: give text with --text FILE")
    cleaned_topics = [inspect.cleandoc(topics[name]) for name in sorted(topics)]
    return cleaned_topics + [text for text in found if len(text) >= SHORTEST_DOCSTRING]


def read_text(path: Path) -> str:
    """Return what the file holds; raises LionError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LionError(f"--text {path}: {error}; give a readable UTF-8 text file") from error


def paragraphs(text: str) -> list[str]:
    """Return the parts of `text` between blank lines, with their indentation."""
    return [part.strip("\n") for part in re.split(r"\n[^\S\n]*(?=\n)", text) if part.strip()]


def read_documents(text: Sequence[Path]) -> list[str]:
    """Return the paragraphs of the files in order, or Python's documentation if there is no file."""
    if not text:
        return python_documents(STANDARD_LIBRARY)
    return [part for path in text for part in paragraphs(read_text(path))]


def at_most(documents: list[str], megabytes: float) -> list[str]:
    """Return a sample of at most so many megabytes, in the given order; hashes spread it over all of the text."""
    kept, budget = set(), megabytes * 1e6
    for document in sorted(documents, key=lambda document: digest_number(document, 0)):
        size = len(document.encode("utf-8"))
        if size <= budget:
            kept.add(document)
            budget -= size
    return [document for document in documents if document in kept]


def split_documents(documents: Sequence[str]) -> dict[str, list[str]]:
    """Return about 90, 5 and 5 % as train, valid and test; a text's own hash decides, whatever stands around it."""
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for document in documents:
        splits[split_of(document, SHARES)].append(document)
    return splits


def select_documents(documents: list[str], max_megabytes: float | None) -> dict[str, list[str]]:
    """Return the documents of each split, identical ones once; raises LionError if a split would have none."""
    documents = list(dict.fromkeys(documents))
    limit, remedy = "", "give a hundred documents or more (a blank line ends a document)"
    if max_megabytes is not None:
        documents = at_most(documents, max_megabytes)
        limit, remedy = f" within --max-megabytes {max_megabytes:g}", "give a larger --max-megabytes, or more text"
    splits = split_documents(documents)
    if empty := [name for name in SPLITS if not splits[name]]:
        found = f"only {len(documents)} distinct documents{limit}"
        raise LionError(f"{found}, which leaves none for {' and '.join(empty)}: {remedy}")
    return splits


def write_indexed_dataset(prefix: Path, documents: list[str], tokenizer: Any) -> int:
    """Write `prefix`.bin and `prefix`.idx, a sequence per document; return the number of tokens, with their EODs."""
    # Imported here, not above: Megatron takes seconds, which --help and reuse can do without.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for document in documents:
        ids = [*tokenizer.tokenize(document), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return sum(builder.sequence_lengths)


def build(staging: Path, splits: dict[str, list[str]], vocab_size: int) -> dict[str, Any]:
    """Write all files but the manifest into `staging`, and return the manifest's part about them."""
    model = staging / TOKENIZER
    sample = at_most(splits["train"], TOKENIZER_TRAINING_MEGABYTES)
    model.write_bytes(train_sentencepiece(sample, vocab_size))
    tokenizer = TokenizerOptions(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model)).build()
    print(f"tokenizer: {tokenizer.vocab_size:,} pieces; token {tokenizer.eod} ends a document")
    summary = {}
    for name, documents in splits.items():
        tokens = write_indexed_dataset(staging / PREFIX.format(name), documents, tokenizer)
        size = len("".join(documents).encode("utf-8"))
        summary[name] = {"documents": len(documents), "bytes": size, "tokens": tokens}
        print("{:>9}: {documents:,} documents, {bytes:,} bytes, {tokens:,} tokens".format(name, **summary[name]))
    entries = {path.name: file_entry(path) for path in sorted(staging.iterdir())}
    described = {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "sha256": entries[TOKENIZER]["sha256"]}
    return {"splits": summary, "tokenizer": described, "files": entries}


def complete_manifest(output: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the folder's manifest if it answers `request` and every file in it is as recorded, otherwise None."""
    try:
        manifest: dict[str, Any] = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        same_request = all(manifest[key] == value for key, value in request.items())
        same_files = all(file_entry(output / name) == entry for name, entry in manifest["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # absent, cut short or not ours: all of them mean "build it"
    return manifest if same_request and same_files else None


def publish(staging: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Move the finished files from `staging` into `output`, the manifest last."""
    (output / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        # Megatron keeps its sample index beside the data under a hash of names and settings, not of content
        # (GPTDataset._build_document_sample_shuffle_indices, 0.19): left there, it would be applied to the new tokens.
        if (cache := output / PREFIX.format(split) / "cache").exists():
            shutil.rmtree(cache)
    for name in manifest["files"]:
        os.replace(staging / name, output / name)
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(staging / MANIFEST, output / MANIFEST)


def prepare(
    output: Path, vocab_size: int, max_megabytes: float | None = None, text: Sequence[Path] = (), force: bool = False
) -> dict[str, Any]:
    """Make the corpus under `output`, unless it is there already, and return its manifest.

    Raises LionError if an option or the text does not allow it; what `output` held before is then untouched.
    """
    if not 0 < vocab_size < 2**31:
        raise LionError(f"--vocab-size {vocab_size} is not a possible number of pieces: give one like 2048")
    if max_megabytes is not None and not 0 < max_megabytes < math.inf:
        raise LionError(f"--max-megabytes {max_megabytes:g} is not above zero: give one like 2, or leave it out")
    sources = [hashlib.sha256(read_text(path).encode("utf-8")).hexdigest() for path in text]
    options = {"vocab_size": vocab_size, "max_megabytes": max_megabytes, "text_sha256": sources}
    request = {"format": FORMAT, "python": platform.python_version(), "options": options}
    if not force and (manifest := complete_manifest(output, request)):
        print(f"reusing the complete corpus in {output} (--force rebuilds it)")
        return manifest
    print("reading: " + (" ".join(map(str, text)) or "Python's help topics and docstrings"))
    splits = select_documents(read_documents(text), max_megabytes)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as staging:
        manifest = request | build(Path(staging), splits, vocab_size)
        publish(Path(staging), output, manifest)
    return manifest


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the corpus")
    add("--vocab-size", type=int, default=2048, metavar="N", help="pieces in the tokenizer (default 2048)")
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
    print(f"done in {time.monotonic() - start:.1f} s; to train on it, give Megatron")
    print("    " + " \\\n    ".join(map(shlex.join, flags.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
