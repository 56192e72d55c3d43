#!/usr/bin/env python3
"""Turn text into Megatron's indexed data set: OpenWebText or any other, on any number of cores, in bounded memory.

    python tools/prepare_text.py --input openwebtext/*.jsonl.zst --output-prefix data/owt --workers 32 --append-eod \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --split 998,1,1
    python tools/prepare_text.py --input Skylion007/openwebtext ...         a data set of the hub, streamed
    python tools/prepare_text.py --output-prefix data/owt --verify          compare existing output with its manifest

It writes these files, named as by Megatron's preprocess_data.py:

    PREFIX_text_document.{bin,idx}                       the tokens; with --split one pair for each of
    PREFIX_{train,valid,test}_text_document.{bin,idx}    train, valid and test; _sentence with --split-sentences
    PREFIX_manifest.json                                 sources, tokenizer, counts, checksums; written last

After a kill, run the same command again: finished shards are kept (in PREFIX.shards until all is done). The files are
the same bytes for every --workers and any number of kills.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from corpus import manifest, shards, sources, splits, tokenizers, workers
from corpus.progress import Progress

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors

FORMAT = 2  # raise it when the same request would give other files


def output_name(prefix: Path, part: str, encoding: shards.Encoding) -> Path:
    """Path of a part of the corpus without its suffix, for Megatron's --data-path."""
    middle = "" if part == shards.WHOLE else f"_{part}"
    level = "sentence" if encoding.split_sentences else "document"
    return prefix.with_name(f"{prefix.name}{middle}_{encoding.key}_{level}")


def request_of(found: list[sources.Source], encoding: shards.Encoding, args: argparse.Namespace) -> dict[str, Any]:
    """Settings that decide the files' bytes. A resumed run compares them. Sources count by name and size.

    Their text is compared separately: by each shard's digest in an incomplete corpus, by :func:`is_unchanged` in a
    complete one.
    """
    tokenizer = encoding.tokenizer
    settings = {name: value for name, value in asdict(encoding).items() if name != "tokenizer"}
    settings["split"] = list(encoding.split) if encoding.split else None
    return {
        "format": FORMAT,
        "sources": [{"name": source.name, "bytes": source.total} for source in found],
        "tokenizer_sha256": tokenizer.sha256(),
        "shard_megabytes": args.shard_megabytes,
        "text_documents": args.text_documents,
        "dataset_split": args.dataset_split,
        **settings,
    }


def is_unchanged(content: dict[str, Any], found: list[sources.Source], shard_bytes: int) -> bool:
    """Whether the sources hold the text that the corpus with this manifest was made of.

    Files that were changed since are read again, since a copy of them is newer too.
    """
    if content["changed"] == [source.changed for source in found]:
        return True
    return bool(content["text"] == shards.text_digest(shard.digest() for shard in shards.cut(found, shard_bytes)))


def begin(
    prefix: Path, request: dict[str, Any], outputs: list[Path], found: list[sources.Source], shard_bytes: int
) -> Path | None:
    """Return the folder of shards to begin or continue in, or None if the corpus is complete.

    Raises LionError, with nothing touched, where files of another corpus are in the way, and where a complete corpus
    was made of another text than the sources hold now.
    """
    folder = prefix.with_name(f"{prefix.name}.shards")
    if manifest.manifest_path(prefix).exists():
        content = manifest.read_manifest(prefix)
        if content["request"] != request:
            raise LionError(
                f"{manifest.manifest_path(prefix)} belongs to a corpus with other settings: use another --output-prefix"
            )
        if not is_unchanged(content, found, shard_bytes):
            raise LionError(
                f"the text was changed after {manifest.manifest_path(prefix)} was written: use another "
                "--output-prefix, or remove the corpus"
            )
        shutil.rmtree(folder, ignore_errors=True)  # there still, if the run was killed right at its end
        return None
    begun = folder / "request.json"
    if begun.exists():
        old = json.loads(begun.read_text(encoding="utf-8"))
        changed = sorted(name for name in request.keys() | old.keys() if request.get(name) != old.get(name))
        if changed:
            raise LionError(f"{folder} was begun with other {', '.join(changed)}: remove it, or use the same again")
        return folder
    if there := [
        path for output in outputs for suffix in (".bin", ".idx") if (path := Path(f"{output}{suffix}")).exists()
    ]:
        raise LionError(f"{there[0]} was not written by this tool: use another --output-prefix, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_json(begun, request)
    return folder


def finish(
    prefix: Path,
    folder: Path,
    request: dict[str, Any],
    changed: list[int],
    encoding: shards.Encoding,
    tokenizer: Any,
    made: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """Join the parts, move them into place, write the manifest last, and return it.

    Raises LionError where a part has no document: Megatron cannot open an empty file.
    """
    in_order = [made[index] for index in sorted(made)]
    counts = {
        part: {
            name: sum(record["counts"][part][name] for record in in_order)
            for name in ("documents", "sequences", "tokens", "text_bytes")
        }
        for part in encoding.parts()
    }
    if empty := [part for part, count in counts.items() if not count["documents"]]:
        raise LionError(f"there is no document for {' and '.join(empty)}: use more text, or another --split")
    files: dict[str, Any] = {}
    for part in encoding.parts():
        output = output_name(prefix, part, encoding)
        files |= shards.join([shards.part_prefix(folder, index, part) for index in sorted(made)], folder / output.name)
    for name in files:
        os.replace(folder / name, prefix.with_name(name))
    bad: dict[str, int] = {}
    for record in in_order:
        for kind, count in record["bad"].items():
            bad[kind] = bad.get(kind, 0) + count
    chosen = encoding.tokenizer
    content = {
        "request": request,
        "changed": changed,
        "text": shards.text_digest(record["digest"] for record in in_order),
        "tokenizer": {
            "type": chosen.tokenizer_type,
            "files": [path.name for path in chosen.files()],
            "sha256": chosen.sha256(),
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "counts": counts,
        "skipped": bad,
        "files": files,
    }
    shards.write_json(manifest.manifest_path(prefix), content)
    shutil.rmtree(folder)
    return content


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Make the corpus that the command line asks for, unless it is there, and return its manifest."""
    encoding = shards.Encoding(
        tokenizer=tokenizers.options_from(args),
        key=args.json_keys,
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        keep_newlines=args.keep_newlines,
        split=splits.parse_split(args.split) if args.split else None,
    )
    if args.workers < 1 or not args.shard_megabytes > 0:
        raise LionError(f"--workers {args.workers} and --shard-megabytes {args.shard_megabytes:g} must be above zero")
    prefix = Path(args.output_prefix)
    found = sources.find_sources(
        args.input, key=encoding.key, documents=args.text_documents, dataset_split=args.dataset_split
    )
    request = request_of(found, encoding, args)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    shard_bytes = int(args.shard_megabytes * 1e6)
    outputs = [output_name(prefix, part, encoding) for part in encoding.parts()]
    folder = begin(prefix, request, outputs, found, shard_bytes)
    if folder is None:
        print(f"complete already: {manifest.manifest_path(prefix)}")
        return manifest.read_manifest(prefix)
    tokenizer = workers.build_tokenizer(encoding)
    progress = Progress(sum(source.total for source in found))
    made: dict[int, dict[str, Any]] = {}
    stream = shards.cut(found, shard_bytes)
    for shard, record, made_now in workers.records(stream, folder, encoding, workers=args.workers, strict=args.strict):
        progress.add(shard, record, made_now)
        made[shard.index] = record
    if not made:
        raise LionError(f"--input {' '.join(args.input)} has no text")
    for where in [line for index in sorted(made) for line in made[index]["first_bad"]][: shards.FIRST_BAD]:
        print(f"  skipped {where}")
    changed = [source.changed for source in found]
    content = finish(prefix, folder, request, changed, encoding, tokenizer, made)
    kept = f"; {progress.kept} finished shards kept" if progress.kept else ""
    print(f"{progress.line()}{kept}")
    report(content)
    return content


def report(content: dict[str, Any]) -> None:
    """Print what a corpus holds."""
    for part, count in content["counts"].items():
        text = "{documents:,} documents, {sequences:,} sequences, {tokens:,} tokens, {text_bytes:,} bytes of text"
        print(f"{part:>6}: {text.format(**count)}")
    if content["skipped"]:
        print("skipped: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(content["skipped"].items())))


def verify(args: argparse.Namespace) -> int:
    """Compare the files, and the tokenizer if it is passed, with the manifest. Returns 0 if all is well, else 1."""
    tokenizer = tokenizers.options_from(args) if args.tokenizer_type else None
    found = manifest.problems(Path(args.output_prefix), tokenizer)
    for problem in found:
        print(f"problem: {problem}", file=sys.stderr)
    if not found:
        report(manifest.read_manifest(Path(args.output_prefix)))
        print("as the manifest says" + ("" if tokenizer is None else ", tokenizer included"))
    return 1 if found else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; --input and --tokenizer-type may only be left out with --verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files (jsonl, txt, parquet; .gz, .zst), folders, data sets",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="path and first part of the names of what is written")
    add("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document token")
    add("--split-sentences", action="store_true", help="a sequence for each sentence, as BERT needs")
    add("--keep-newlines", action="store_true", help="keep line breaks inside sentences")
    add("--split", metavar="N,N,N", help="shares of train, valid and test, by each document's hash (default: no split)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that tokenize (default: %(default)s)",
    )
    add(
        "--shard-megabytes",
        type=float,
        default=16.0,
        metavar="N",
        help="text in a shard, the unit of resuming (default: %(default)s)",
    )
    add("--strict", action="store_true", help="stop at the first bad line instead of skipping and counting")
    add("--verify", action="store_true", help="compare what is at --output-prefix with its manifest, and write nothing")
    sources.add_arguments(parser)
    tokenizers.add_arguments(parser)
    args = parser.parse_args(arguments)
    if not args.verify and not args.input:
        parser.error("--input is missing: pass files, folders or data sets (or --verify)")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse(arguments)
    if args.verify:
        return verify(args)
    prepare(args)
    return 0


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
