"""The text of the long runs as Megatron reads it, made once with the project's own tools.

Training, validation and test documents are split by hash. Besides, the *fixed split*: training documents of at most
300,000 tokens, on which loss and gradient are exact, and test documents as plain text for perplexities, without those
that repeat a part of the training text.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.config import LionError
from tools.corpus.documents import SHARES, at_most, read_documents, split_documents
from tools.paper.studies import package_text

TOOLS = Path(__file__).resolve().parents[2]
VOCABULARY = 2048  # a multiple of 128: no row is padding
FIXED_SPLIT_TOKENS = 300_000
# Below 300,000 tokens of the fixed split, with room: a token has 3.1 bytes of these texts.
FIXED_SPLIT_MEGABYTES = 0.9
HELD_OUT_MEGABYTES = 0.5
COPIED = 50  # characters; a common part of twice that is always found


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a family of models reads text."""

    tokenizer: str
    vocabulary: tuple[tuple[str, str], ...]
    """Megatron's flag and the file's name"""
    level: str
    """``document`` or ``sentence``, the end of the data files' names"""
    flags: tuple[str, ...]
    """of tools/prepare_text.py"""


KINDS = {
    "gpt": Kind(
        tokenizer="GPT2BPETokenizer",
        vocabulary=(("--vocab-file", "vocab.json"), ("--merge-file", "merges.txt")),
        level="document",
        flags=("--append-eod",),
    ),
    "bert": Kind(
        tokenizer="BertWordPieceLowerCase",
        vocabulary=(("--vocab-file", "vocab.txt"),),
        level="sentence",
        flags=("--split-sentences",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class LongText:
    """The files of one family's text in one folder."""

    folder: Path
    kind: Kind

    @property
    def prefix(self) -> Path:
        """Key ``data`` of the paper's recipes: prefix of the splits, and folder of the vocabulary."""
        return self.folder / "text"

    @property
    def fixed_split(self) -> Path:
        """Prefix of the fixed split's data, for ``--train-data-path``."""
        return self.folder / f"fixed_text_{self.kind.level}"

    @property
    def held_out(self) -> Path:
        """Test documents as plain text, without those that repeat training text."""
        return self.folder / "held-out.txt"

    def counts(self) -> dict[str, int]:
        """Tokens of each split, from the manifests."""
        splits = {
            name: entry["tokens"] for name, entry in _manifest(self.folder / "text_manifest.json")["counts"].items()
        }
        return splits | {"fixed": _manifest(self.folder / "fixed_manifest.json")["counts"]["all"]["tokens"]}


def paths(folder: Path, name: str) -> LongText:
    """Where the text of ``name`` (``gpt`` or ``bert``) is in ``folder``, or will be."""
    return LongText(folder=folder / name, kind=KINDS[name])


def build(folder: Path, name: str) -> LongText:
    """Make what is missing of the text of ``name`` in ``folder``, and return it.

    Raises LionError where a package cannot be downloaded, and where a tool fails; its error is on the screen.
    """
    text = paths(folder, name)
    if (text.folder / "complete").is_file():
        return text
    packages = package_text.build(folder / "packages")
    text.folder.mkdir(parents=True, exist_ok=True)
    splits = split_documents(list(dict.fromkeys(read_documents(packages))))
    training = _write(text.folder / "training.txt", splits["train"])
    fixed = _write(text.folder / "fixed.txt", at_most(splits["train"], FIXED_SPLIT_MEGABYTES))
    _write(text.held_out, at_most(without_copies(splits["test"], splits["train"]), HELD_OUT_MEGABYTES))
    kind = ["--tokenizer-type", text.kind.tokenizer]
    if not text.prefix.is_dir():
        vocabulary = ["--vocab-size", str(VOCABULARY), "--output", str(text.prefix)]
        _tool("train_tokenizer.py", "--input", str(training), *kind, *vocabulary)
    files = [word for flag, name in text.kind.vocabulary for word in (flag, str(text.prefix / name))]
    common = [*kind, *files, *text.kind.flags, "--workers", "1"]
    shares = ",".join(map(str, SHARES))
    inputs = ["--input", *map(str, packages)]
    _tool("prepare_text.py", *inputs, "--output-prefix", str(text.prefix), "--split", shares, *common)
    _tool("prepare_text.py", "--input", str(fixed), "--output-prefix", str(text.folder / "fixed"), *common)
    if (tokens := text.counts()["fixed"]) > FIXED_SPLIT_TOKENS:
        raise LionError(f"the fixed split has {tokens:,} tokens, more than {FIXED_SPLIT_TOKENS:,}: lower its megabytes")
    (text.folder / "complete").touch()
    return text


def without_copies(documents: Sequence[str], training: Sequence[str]) -> list[str]:
    """The documents that share no part of ``COPIED`` characters with a training document.

    Only parts that start at a multiple of ``COPIED`` are compared. So a common part is found for certain if it has
    ``2 * COPIED - 1`` characters.
    """
    pieces = [{text[at : at + COPIED] for at in range(0, len(text) - COPIED + 1, COPIED)} for text in documents]
    wanted = frozenset().union(*pieces)
    found = {
        part for text in training for at in range(len(text) - COPIED + 1) if (part := text[at : at + COPIED]) in wanted
    }
    return [text for text, own in zip(documents, pieces, strict=True) if not own & found]


def _write(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(f"{document}\n\n" for document in documents), encoding="utf-8")
    return path


def _tool(name: str, *arguments: str) -> None:
    """Run one of the project's tools. Raises LionError where it fails."""
    if subprocess.run([sys.executable, str(TOOLS / name), *arguments], check=False).returncode:
        raise LionError(f"tools/{name} failed; its error is above")


def _manifest(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    content: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text(encoding="utf-8"))
    return content
