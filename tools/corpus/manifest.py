"""The manifest of a prepared corpus: its sources, its tokenizer, and checksums of its files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError

from .tokenizers import TokenizerOptions


def manifest_path(output_prefix: Path) -> Path:
    """Where the manifest of a corpus is; written last, so its presence means "complete"."""
    return output_prefix.with_name(f"{output_prefix.name}_manifest.json")


def read_manifest(output_prefix: Path) -> dict[str, Any]:
    """Return the manifest. Raises LionError where there is none or it cannot be read."""
    path = manifest_path(output_prefix)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LionError(
            f"{path} cannot be read ({error.strerror}): is --output-prefix the one it was made with?"
        ) from None
    except ValueError as error:
        raise LionError(f"{path} is not a manifest: {error}. Prepare the text again") from None
    return content


def file_entry(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 by which a file's content is recognized."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def problems(output_prefix: Path, tokenizer: TokenizerOptions | None = None) -> list[str]:
    """Return a sentence for each difference from the manifest. An empty list means that all is well.

    Compares sizes and checksums of the files, and ``tokenizer``, if it is passed, with the one that made the tokens.
    """
    manifest = read_manifest(output_prefix)
    found = []
    for name, entry in manifest["files"].items():
        path = output_prefix.with_name(name)
        if not path.is_file():
            found.append(f"{path} is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            found.append(f"{path} has {size:,} bytes, the manifest says {entry['bytes']:,}")
        elif file_entry(path) != entry:
            found.append(f"{path} does not match the manifest (same size, other SHA-256)")
    if tokenizer is not None:
        found += tokenizer_problem(manifest, tokenizer)
    return found


def tokenizer_problem(manifest: dict[str, Any], tokenizer: TokenizerOptions) -> list[str]:
    """A sentence if ``tokenizer`` is not the one that the corpus was made with, else an empty list."""
    made_with = manifest["tokenizer"]
    if tokenizer.sha256() == made_with["sha256"]:
        return []
    return [
        f"the corpus was made with {made_with['type']} {' and '.join(made_with['files'])} "
        f"(SHA-256 {made_with['sha256'][:12]}), not with {tokenizer.tokenizer_type} "
        f"{' and '.join(path.name for path in tokenizer.files())} ({tokenizer.sha256()[:12]}): its tokens mean "
        "something else"
    ]
