"""Read documents from files, folders and data sets, one after another, never a whole source at once.

A source is read as a stream of *units*: an unparsed line of a JSON-lines file (the workers parse it), or the text of a
document. Only the sources determine the order, so all later steps are reproducible.
"""

import argparse
import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lion.config import LionError

PACKED = (".gz", ".zst")
JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN_TEXT = (".txt", ".text", ".tokens", ".md")
DOCUMENT_RULES = ("blank-line", "line", "wikitext")
_WIKITEXT_TITLE = re.compile(rb"^ ?= [^=].* =\s*$")  # detokenized or not


@dataclass
class Source:
    """One file or data set.

    ``kind`` is "json" (units are lines to be parsed) or "text" (units are documents in UTF-8). ``total`` is the size
    that progress is measured against, 0 where it is not known, and ``consumed`` how much of it has been read.
    ``changed`` is the time of the last change in nanoseconds, 0 for a data set of the hub.
    """

    name: str
    kind: str
    units: Callable[["Source"], Iterator[bytes]]
    total: int = 0
    changed: int = 0
    consumed: int = field(default=0, compare=False)


def find_sources(inputs: Sequence[str], *, key: str, documents: str, dataset_split: str) -> list[Source]:
    """Return what ``--input`` names, in order: files, the files in folders by name, saved or hub data sets.

    ``key`` names the text's field in JSON and tables, ``documents`` the rule by which plain text falls into documents,
    ``dataset_split`` the split of a data set. Raises LionError for a file that is missing or of an unknown kind.
    """
    sources: list[Source] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir() and not (path / "dataset_info.json").is_file():
            files = sorted(part for part in path.rglob("*") if part.is_file() and suffix_of(part) is not None)
            if not files:
                raise LionError(f"--input {name} has no {', '.join((*JSON_LINES, *PLAIN_TEXT, '.parquet'))} file")
            sources += [file_source(part, key, documents) for part in files]
        elif path.is_file():
            sources.append(file_source(path, key, documents))
        elif path.is_dir() or re.fullmatch(r"[\w-]+/[\w.-]+", name):
            changed = max((part.stat().st_mtime_ns for part in path.rglob("*")), default=0)
            texts = lambda source: dataset_texts(source.name, dataset_split, key)  # noqa: E731
            sources.append(Source(name, "text", texts, changed=changed))
        else:
            raise LionError(f"--input {name}: no such file or folder, nor a data set's name such as owner/name")
    return sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how documents are found in what --input names."""
    add = parser.add_argument_group("documents").add_argument
    add(
        "--json-keys",
        default="text",
        metavar="KEY",
        help="the field or column that holds the text (default: %(default)s)",
    )
    add("--dataset-split", default="train", metavar="NAME", help="which split of a hub data set (default: %(default)s)")
    add(
        "--text-documents",
        choices=DOCUMENT_RULES,
        default="blank-line",
        help="what ends a document in plain text (default: %(default)s)",
    )


def suffix_of(path: Path) -> str | None:
    """The suffix that says what is in the file, a packing left aside; None for one that this module cannot read."""
    suffixes = [part.lower() for part in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    known = (*JSON_LINES, *PLAIN_TEXT, ".parquet")
    return suffixes[-1] if suffixes and suffixes[-1] in known else None


def file_source(path: Path, key: str, documents: str) -> Source:
    """The source that the file is, by its suffix. Raises LionError for an unknown one."""
    suffix = suffix_of(path)
    found = path.stat()
    about = {"total": found.st_size, "changed": found.st_mtime_ns}
    if suffix == ".parquet":
        return Source(str(path), "text", lambda source: parquet_texts(source, key), **about)
    if suffix in JSON_LINES:
        return Source(str(path), "json", lines, **about)
    if suffix in PLAIN_TEXT:
        return Source(str(path), "text", lambda source: plain_documents(lines(source), documents), **about)
    kinds = ", ".join((*JSON_LINES, *PLAIN_TEXT, ".parquet"))
    raise LionError(
        f"--input {path}: unknown kind of file; known are {kinds}, packed with {' or '.join(PACKED)} or not"
    )


def lines(source: Source) -> Iterator[bytes]:
    """Yield the file's lines, unpacked, without byte order marks; ``source.consumed`` follows the packed file.

    A mark begins a file, and a line where files were put together. Raises LionError for damage, and for UTF-16.
    """
    with open(source.name, "rb") as raw, unpacked(raw, source.name) as stream:
        try:
            for line in stream:
                if source.consumed == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise LionError(f"{source.name} is UTF-16, not UTF-8: convert it, for example with iconv")
                source.consumed = raw.tell()
                yield line.removeprefix(codecs.BOM_UTF8)
        except (EOFError, zlib.error, OSError) as error:
            raise LionError(f"{source.name} is damaged or cut short: {error}. Fetch it again") from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # a class of the optional package
                raise
            raise LionError(f"{source.name} is damaged: {error}. Fetch it again") from error


def unpacked(raw: BinaryIO, name: str) -> BinaryIO:
    """The file's content, whatever it is packed with. Raises LionError where the package for it is missing."""
    if name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[return-value]
    if name.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise LionError(f"{name} needs the package zstandard: pip install zstandard") from error
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader)  # type: ignore[arg-type, return-value]
    return raw


def plain_documents(stream: Iterable[bytes], rule: str) -> Iterator[bytes]:
    """Cut lines of plain text into documents: "line", "blank-line" (paragraphs) or "wikitext" (articles)."""
    gathered: list[bytes] = []
    for line in stream:
        ends = not line.strip() if rule == "blank-line" else rule == "line" or bool(_WIKITEXT_TITLE.match(line))
        if ends and gathered:
            yield _joined(gathered)
            gathered = []
        if rule != "blank-line" or not ends:
            gathered.append(line.rstrip(b"\r\n"))
    if gathered:
        yield _joined(gathered)


def _joined(gathered: list[bytes]) -> bytes:
    return b"\n".join(gathered).strip(b"\n")


def parquet_texts(source: Source, key: str) -> Iterator[bytes]:
    """Yield the texts of column ``key``, a batch of rows in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source.name)
        if key not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise LionError(f"{source.name} has no column {key!r}: choose one with --json-keys ({columns})")
        rows = max(file.metadata.num_rows, 1)
        seen = 0
        for batch in file.iter_batches(batch_size=256, columns=[key], use_threads=False):
            for value in batch.column(0).to_pylist():
                yield _as_bytes(value)
            seen += batch.num_rows
            source.consumed = source.total * seen // rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise LionError(f"{source.name} is damaged or not a parquet file: {error}") from error


def dataset_texts(name: str, split: str, key: str) -> Iterator[bytes]:
    """Yield the texts of a data set on the Hugging Face hub (streamed) or saved with ``save_to_disk``.

    Raises LionError where it cannot be loaded, has no column ``key``, or breaks off.
    """
    import datasets

    try:
        if Path(name).is_dir():
            found: Any = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub's client raises one of a dozen kinds, of several packages
        raise LionError(
            f"--input {name} cannot be loaded as a data set: {' '.join(str(error).split())}. HF_ENDPOINT names another "
            "hub; without one give files, or a folder that save_to_disk made elsewhere"
        ) from error
    rows, read = iter(found), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # as above
            raise LionError(
                f"{name} broke off after {read:,} documents: {error}. Run the same command again to continue"
            ) from error
        if row is None:
            return
        if key not in row:
            raise LionError(f"{name} has no column {key!r}: choose one with --json-keys ({', '.join(row)})")
        yield _as_bytes(row[key])
        read += 1


def _as_bytes(value: Any) -> bytes:
    """UTF-8. If it is not a string, its JSON, which the worker counts as bad."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b"\xff" + json.dumps(value).encode()
