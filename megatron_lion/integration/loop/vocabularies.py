"""Megatron's GPT-2 and BERT tokenizers from the user's own vocabulary files, without asking the Hugging Face hub."""

import codecs
import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError, check_choice, check_data_prefix

# Settings of the hub's "gpt2", "bert-large-uncased" and "bert-large-cased" next to their vocabularies, and the file
# names of each tokenizer class.
LOCAL = {
    "GPT2BPETokenizer": ({"tokenizer_class": "GPT2Tokenizer"}, ("vocab.json", "merges.txt")),
    "BertWordPieceLowerCase": ({"tokenizer_class": "BertTokenizer", "do_lower_case": True}, ("vocab.txt",)),
    "BertWordPieceCase": ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, ("vocab.txt",)),
}

# The flags that each tokenizer needs, in the order in which their files are hashed.
REQUIRED = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
}
# Files of a Hugging Face folder that decide how text becomes tokens.
HUGGING_FACE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_config.json",
)


def tokenizer_files(args: Any) -> list[Path]:
    """The files that make the tokenizer that Megatron's ``args`` name.

    Raises LionError for a type that is not one of ``REQUIRED`` and for a file that is missing.
    """
    kind = check_choice("--tokenizer-type", args.tokenizer_type, REQUIRED)
    found: list[Path] = []
    for name in REQUIRED[kind]:
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is None:
            raise LionError(
                f"{kind} needs {flag}: pass its path (tools/train_tokenizer.py makes one from your own text)"
            )
        path = Path(value)
        if kind == "HuggingFaceTokenizer" and path.is_dir():
            found += [path / part for part in HUGGING_FACE_FILES if (path / part).is_file()]
        elif path.is_file():
            found.append(path)
        else:
            raise LionError(f"{flag} {value} does not exist: pass the path of {kind}'s file")
    if not found:
        raise LionError(f"--tokenizer-model {args.tokenizer_model} has none of {', '.join(HUGGING_FACE_FILES)}")
    return found


def tokenizer_sha256(args: Any) -> str:
    """A hash of the type and of the files' contents, independent of their names and folders."""
    digest = hashlib.sha256(args.tokenizer_type.encode())
    for path in tokenizer_files(args):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_data_manifests(args: Any) -> None:
    """Raise LionError where a manifest of tools/prepare_text.py says that the data is not what it should be.

    Compares the tokenizer and the sizes of the files for every prefix that Megatron will read, links followed. Data
    without a manifest pass, and so do other files of that name. A tokenizer that is not a local file is not compared. A
    file in a prefix's place is an error, too.
    """
    named = _data_prefixes(args)
    for prefix in named:
        check_data_prefix("data prefix", prefix)
    prefixes = [Path(f"{prefix}.bin").resolve().with_suffix("") for prefix in named]
    for folder in dict.fromkeys(prefix.parent for prefix in prefixes):
        names = {f"{prefix.name}.bin" for prefix in prefixes if prefix.parent == folder}
        for path in sorted(folder.glob("*_manifest.json")):
            manifest = _read_manifest(path, names)
            if manifest and (concerned := sorted(names & manifest["files"].keys())):
                _check_manifest(args, path, manifest, concerned)


def _read_manifest(path: Path, names: set[str]) -> dict[str, Any] | None:
    """The manifest at ``path``, or None for a file that is not one of tools/prepare_text.py.

    Raises LionError for a file that cannot be read if its name is that of a manifest for one of the files ``names``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        prefix = path.name.removesuffix("manifest.json")
        if not any(name.startswith(prefix) for name in names):
            return None
        raise LionError(
            f"{path} cannot be read: {error}. It should say how the data were made: prepare the text again, or move "
            "the file if it is not of tools/prepare_text.py"
        ) from error
    is_manifest = isinstance(content, dict) and all(
        isinstance(content.get(key), dict) for key in ("files", "tokenizer")
    )
    return content if is_manifest else None


def _data_prefixes(args: Any) -> list[str]:
    """All data that the command line names, as Megatron reads it: in flags or in files, with or without weights."""
    from megatron.training.utils import get_blend_and_blend_per_split

    try:
        whole, splits = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, LookupError) as error:
        raise LionError(
            f"--data-args-path {args.data_args_path} or --per-split-data-args-path {args.per_split_data_args_path} "
            f"cannot be read: {error!r}"
        ) from error
    return [prefix for blend in (whole, *(splits or ())) if blend is not None for prefix in blend[0]]


def _check_manifest(args: Any, path: Path, manifest: dict[str, Any], names: list[str]) -> None:
    files = [other for data in names for other in (data, f"{data[:-4]}.idx")]
    try:
        sizes = {name: int(manifest["files"][name]["bytes"]) for name in files}
        sha256, kind, made_with = (manifest["tokenizer"][key] for key in ("sha256", "type", "files"))
    except (KeyError, TypeError, ValueError) as error:
        raise LionError(f"{path} is incomplete ({error!r}): prepare the text again") from error
    for name, expected in sizes.items():
        file = path.with_name(name)
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise LionError(
                f"{file} has {size:,} bytes, and {path.name} says {expected:,}: it was cut short or changed. Prepare "
                "the text again"
            )
    if args.tokenizer_type in REQUIRED and tokenizer_sha256(args) != sha256:
        raise LionError(
            f"{path.with_name(names[0])} was made with {kind} {' and '.join(made_with)} (SHA-256 {sha256[:12]}, says "
            f"{path.name}), but --tokenizer-type {args.tokenizer_type} with the files of this run is another "
            "tokenizer. Use that tokenizer, or prepare the text with this one"
        )


def use_local_vocabularies() -> None:
    """Let ``--vocab-file`` and ``--merge-file`` be enough for GPT2BPETokenizer and BertWordPiece{LowerCase,Case}.

    Stock 0.19.2 asks the hub for "gpt2" or "bert-large-*" even where both files are given (megatron_hf_tokenizer 83,
    huggingface_tokenizer 68): without the network it retries for 45 seconds and fails. Replaces the constructor of
    Megatron's ``MegatronHFTokenizer``; without ``--vocab-file`` it works as before. Idempotent. Remove this when
    Megatron reads the files it is given.
    """
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
    from megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer import MegatronHFTokenizer

    stock_init = MegatronHFTokenizer.__init__
    if getattr(stock_init, "_reads_local_files", False):
        return

    @functools.wraps(stock_init)
    def init(
        self: Any, tokenizer_path: str, vocab_file: str | None = None, merges_file: str | None = None, **kwargs: Any
    ) -> None:
        if not vocab_file or tokenizer_path not in LOCAL:
            stock_init(self, tokenizer_path, vocab_file, merges_file, **kwargs)
            return
        description, names = LOCAL[tokenizer_path]
        given = {"--vocab-file": vocab_file, "--merge-file": merges_file}
        # The fast tokenizers read everything at once and keep it in memory, so the folder may go afterwards.
        with tempfile.TemporaryDirectory() as folder:
            for name, (flag, path) in zip(names, given.items(), strict=False):
                if not path or not Path(path).is_file():
                    raise LionError(f"{flag} {path} is not a file: {tokenizer_path} needs {' and '.join(names)}")
                (Path(folder) / name).write_bytes(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8))
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(description), encoding="utf-8")
            HuggingFaceTokenizer.__init__(self, folder, **kwargs)

    init._reads_local_files = True  # type: ignore[attr-defined]
    MegatronHFTokenizer.__init__ = init
