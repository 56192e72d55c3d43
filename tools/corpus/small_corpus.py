"""Build a small corpus folder in one go: tokenizer, indexed data sets and manifest.

A folder with a manifest is complete. A complete folder made with the same options and Python is reused.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError

from .documents import at_most, read_documents, read_text, select_documents
from .manifest import file_entry
from .splits import SPLITS
from .tokenizers import TokenizerOptions
from .vocabularies import train_sentencepiece

FORMAT = 1  # raise it when the same options would give other files, so that folders of older versions are rebuilt
PREFIX = "{}_text_document"  # the value of --train-data-path and its kin, without the folder
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TOKENIZER_TRAINING_MEGABYTES = 32.0  # more changes a small vocabulary little, and costs memory and time


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
        # Megatron keeps its sample index next to the data under a hash of names and settings, not of content
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

    Raises LionError if an option or the text does not allow it. Then `output` is not changed.
    """
    if not 0 < vocab_size < 2**31:
        raise LionError(f"--vocab-size {vocab_size} is not a possible number of pieces: use one like 2048")
    if max_megabytes is not None and not 0 < max_megabytes < math.inf:
        raise LionError(f"--max-megabytes {max_megabytes:g} is not above zero: use one like 2, or remove it")
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
