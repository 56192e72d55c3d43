"""Cut sources into shards, turn each into its own part of the data set, and join the parts.

A shard is a run of units of one source, of about a fixed size of text. Its part on disk is complete when its record
exists, and the record has a digest of the text. So a killed run continues without repeating finished shards, and the
joined files do not depend on the number of workers or the order of their parts.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_lion.config import LionError

from .sentences import split_sentences
from .sources import Source
from .splits import SPLITS, split_of
from .tokenizers import TokenizerOptions, tokenize_all

WHOLE = "all"  # the one part of a corpus that is not split
FIRST_BAD = 5  # how many bad units of a shard are named in its record
INDEX_HEADER_BYTES = 18  # of an .idx file: 9 of magic, 8 of version, 1 for the tokens' type (indexed_dataset 150)


@dataclass(frozen=True)
class Shard:
    """A run of units. ``first`` is the first one's number in its source, from 1. ``consumed`` is only for progress."""

    index: int
    source: str
    kind: str
    first: int
    units: tuple[bytes, ...]
    consumed: int

    def digest(self) -> str:
        """A hash of the units and of where one ends and the next begins."""
        state = hashlib.blake2b(digest_size=16)
        for unit in self.units:
            state.update(len(unit).to_bytes(8, "little"))
            state.update(unit)
        return state.hexdigest()


def text_digest(digests: Iterable[str]) -> str:
    """A hash of a corpus's text: of its shards' digests, in order."""
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How units become tokens. Equal encodings give equal parts."""

    tokenizer: TokenizerOptions
    key: str
    append_eod: bool
    split_sentences: bool
    keep_newlines: bool
    split: tuple[int, int, int] | None

    def parts(self) -> tuple[str, ...]:
        """The names of the parts that a corpus falls into."""
        return SPLITS if self.split else (WHOLE,)


def cut(sources: Sequence[Source], shard_bytes: int) -> Iterator[Shard]:
    """Yield the shards of all sources: the same ones whenever the sources and ``shard_bytes`` are the same."""
    index, before = 0, 0
    for source in sources:
        units: list[bytes] = []
        size, count = 0, 0
        for unit in source.units(source):
            units.append(unit)
            size, count = size + len(unit), count + 1
            if size >= shard_bytes:
                yield Shard(
                    index, source.name, source.kind, count - len(units) + 1, tuple(units), before + source.consumed
                )
                index, units, size = index + 1, [], 0
        if units:
            yield Shard(index, source.name, source.kind, count - len(units) + 1, tuple(units), before + source.total)
            index += 1
        before += source.total


class BadUnit(Exception):
    """A unit without a document. The message has the reason."""


def document_text(unit: bytes, kind: str, key: str) -> str:
    """Return the document in a unit, without a byte order mark at its beginning. Raises BadUnit if there is none."""
    try:
        text = unit.decode("utf-8")
    except UnicodeDecodeError:
        raise BadUnit("not UTF-8") from None
    if kind == "text":
        return text.removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise BadUnit("not JSON") from None
    if not isinstance(record, dict) or key not in record:
        raise BadUnit(f"no {key!r}")
    if not isinstance(record[key], str):
        raise BadUnit(f"{key!r} is not a string")
    try:
        record[key].encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no encoding can hold
        raise BadUnit("not Unicode") from None
    return record[key].removeprefix("\ufeff")


def record_path(folder: Path, index: int) -> Path:
    """Where a shard's record is, written last."""
    return folder / f"{index:06d}.json"


def part_prefix(folder: Path, index: int, part: str) -> Path:
    """Path, without its suffix, of a shard's tokens for one part."""
    return folder / f"{index:06d}.{part}"


def finished_record(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """Return the record of a shard that was made before from the same text, else None."""
    try:
        record: dict[str, Any] = json.loads(record_path(folder, shard.index).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or cut short
    return record if record["digest"] == shard.digest() and sizes == record["files"] else None


def write_shard(shard: Shard, folder: Path, encoding: Encoding, tokenizer: Any, strict: bool) -> dict[str, Any]:
    """Write a shard's parts with Megatron's own builder, then its record, which is returned.

    Bad units are counted by kind and left out, or with ``strict`` raise LionError naming file and number. Units without
    a token (blank ones) are counted as "empty".
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    documents, bad, first_bad = _documents(shard, encoding.key, strict)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    # First under names of this process, so that a worker that briefly outlives a killed run does no harm.
    prefixes = {part: part_prefix(folder, shard.index, f"{part}.{os.getpid()}") for part in encoding.parts()}
    builders = {part: IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype) for part, prefix in prefixes.items()}
    counts = {part: {"documents": 0, "sequences": 0, "tokens": 0, "text_bytes": 0} for part in prefixes}
    for text, (ids, lengths) in zip(documents, _encode(documents, encoding, tokenizer), strict=True):
        if not ids:
            bad["empty"] = bad.get("empty", 0) + 1
            continue
        part = split_of(text, encoding.split) if encoding.split else WHOLE
        builders[part].add_document(ids, lengths)
        size = len(text.encode("utf-8"))
        for name, more in (("documents", 1), ("sequences", len(lengths)), ("tokens", len(ids)), ("text_bytes", size)):
            counts[part][name] += more
    for part, prefix in prefixes.items():
        builders[part].finalize(f"{prefix}.idx")
    files = []
    for part, prefix in prefixes.items():
        for suffix in (".bin", ".idx"):
            files.append(f"{part_prefix(folder, shard.index, part).name}{suffix}")
            os.replace(f"{prefix}{suffix}", folder / files[-1])
    record = {"digest": shard.digest(), "source": shard.source, "units": len(shard.units), "counts": counts}
    record |= {"bad": bad, "first_bad": first_bad, "files": {name: (folder / name).stat().st_size for name in files}}
    write_json(record_path(folder, shard.index), record)
    return record


def _documents(shard: Shard, key: str, strict: bool) -> tuple[list[str], dict[str, int], list[str]]:
    documents: list[str] = []
    bad: dict[str, int] = {}
    first_bad: list[str] = []
    for number, unit in enumerate(shard.units, start=shard.first):
        if shard.kind == "json" and not unit.strip():
            continue
        try:
            documents.append(document_text(unit, shard.kind, key))
        except BadUnit as problem:
            where = f"{shard.source}, {'line' if shard.kind == 'json' else 'document'} {number}: {problem}"
            if strict:
                raise LionError(f"{where}. Fix it, or remove --strict to skip and count such lines") from None
            bad[str(problem)] = bad.get(str(problem), 0) + 1
            first_bad += [where] if len(first_bad) < FIRST_BAD else []
    return documents, bad, first_bad


def _encode(documents: list[str], encoding: Encoding, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each document's ids and the lengths of its sequences, the end-of-document token counted to the last.

    A tokenizer that ends every text with that token has ended the document.
    """
    if encoding.split_sentences:
        sentences = [split_sentences(text, encoding.keep_newlines) for text in documents]
    else:
        sentences = [[text] for text in documents]
    encoded = tokenize_all(tokenizer, (sentence for group in sentences for sentence in group))
    (nothing,) = tokenize_all(tokenizer, [""])  # what some tokenizers add to every text
    for group in sentences:
        parts = [ids for ids in (next(encoded) for _ in group) if ids != nothing]
        ids, lengths = [token for part in parts for token in part], [len(part) for part in parts]
        if ids and encoding.append_eod and not (nothing and ids[-1] == nothing[-1] == tokenizer.eod):
            ids.append(tokenizer.eod)
            lengths[-1] += 1
        yield ids, lengths


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def join(prefixes: Sequence[Path], output: Path) -> dict[str, dict[str, Any]]:
    """Write ``output``.bin and .idx out of the shards' and return each file's size and SHA-256.

    The bytes are those of Megatron's ``IndexedDatasetBuilder.add_index`` over the same parts. That one keeps Python
    objects for every sequence in memory (about 80 bytes each), this one a shard's arrays.
    """
    with _HashingWriter(Path(f"{output}.bin")) as data:
        for prefix in prefixes:
            with open(f"{prefix}.bin", "rb") as part:
                while block := part.read(1 << 20):
                    data.write(block)
    with _HashingWriter(Path(f"{output}.idx")) as index:
        index.write(Path(f"{prefixes[0]}.idx").read_bytes()[:INDEX_HEADER_BYTES])
        _write_index(index, prefixes)
    return {data.path.name: data.entry(), index.path.name: index.entry()}


def _write_index(index: "_HashingWriter", prefixes: Sequence[Path]) -> None:
    """The body of an .idx file: the two counts, then for all shards the lengths, the byte offsets, the documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def each() -> Iterator[IndexedDataset]:
        for prefix in prefixes:
            yield IndexedDataset(str(prefix), mmap=False)

    sequences = [len(part) for part in each()]
    documents = sum(len(part.document_indices) - 1 for part in each()) + 1
    index.write(numpy.array([sum(sequences), documents], dtype="<u8").tobytes())
    for part in each():
        index.write(part.sequence_lengths.astype("<i4").tobytes())
    offset = 0
    for part in each():
        size = part.index.dtype_size
        ends = offset + numpy.cumsum(part.sequence_lengths, dtype="<i8") * size
        index.write(numpy.concatenate([[offset], ends])[:-1].astype("<i8").tobytes())
        offset = int(ends[-1]) if len(ends) else offset
    index.write(numpy.zeros(1, dtype="<i8").tobytes())
    for part, before in zip(each(), numpy.cumsum([0, *sequences[:-1]]), strict=True):
        index.write((part.document_indices[1:] + before).astype("<i8").tobytes())


class _HashingWriter:
    """A file and the SHA-256 of what went into it."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.digest = path, 0, hashlib.sha256()

    def __enter__(self) -> "_HashingWriter":
        self.file = open(self.path, "wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self.digest.update(block)
        self.size += len(block)

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}
