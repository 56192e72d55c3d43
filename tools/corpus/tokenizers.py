"""The tokenizers that Megatron names, built by Megatron itself from flags that have Megatron's names."""

import argparse
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration.compat.versions import INSTALL_HINT, megatron_version
from megatron_lion.integration.loop.vocabularies import (
    REQUIRED,
    tokenizer_files,
    tokenizer_sha256,
    use_local_vocabularies,
)

BLOCK_CHARACTERS = 1_000_000


class _Flags(argparse.Namespace):
    """Tokenizer arguments for Megatron. An argument that is not here, but that its version reads, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """A tokenizer by Megatron's flags. :meth:`files` checks it, :meth:`build` builds it."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None

    def files(self) -> list[Path]:
        """The files that make the tokenizer. Raises LionError for an unknown type and for a missing file."""
        return tokenizer_files(self)

    def sha256(self) -> str:
        """A hash of the type and of the files' contents, independent of their names and folders."""
        return tokenizer_sha256(self)

    def build(self) -> Any:
        """Return Megatron's tokenizer, as the same flags build it in training.

        One thing is set apart from the flags' defaults: the BERT tokenizers add no [CLS] and [SEP] of their own, which
        Megatron's BERT dataset puts where it wants them (bert_dataset 133). Raises LionError where it cannot be built.
        """
        self.files()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron lists missing accelerators; none is needed here
            build_tokenizer = _megatrons_builder()
        use_local_vocabularies()
        logging.getLogger("transformers").setLevel(logging.ERROR)  # "sequence longer than 1024" for each document
        args = _Flags(
            **vars(self),
            tokenizer_hf_no_use_fast=False,
            tokenizer_hf_no_include_special_tokens=self.tokenizer_type.startswith("Bert"),
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
            tokenizer_sentencepiece_legacy=False,
            trust_remote_code=False,
            special_tokens=None,
            chat_template=None,
            metadata_path=None,
            pad_vocab_size=False,
            padded_vocab_size=0,  # 0.17 pads where there is none yet
        )
        try:
            return build_tokenizer(args)
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            message = " ".join(str(error).split())
            raise LionError(f"{self.tokenizer_type} cannot be built from {self.files()}: {message}") from error


def _megatrons_builder() -> Any:
    try:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("megatron"):
            raise
        raise LionError(
            f"tokenizers are built by megatron-core, 0.17 or later; this is {megatron_version()}. {INSTALL_HINT}"
        ) from error
    return build_tokenizer


def tokenize_all(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ids of each text, as ``tokenizer.tokenize`` gives them, with few calls into a fast tokenizer.

    A fast tokenizer's answer also has offsets and strings, many times the text, so each call has about a megabyte of
    text.
    """
    inner = tokenizer._tokenizer
    fast = getattr(getattr(inner, "tokenizer", None), "backend_tokenizer", None)
    if fast is None:
        yield from (tokenizer.tokenize(text) for text in texts)
        return
    for block in _blocks(texts):
        encodings = fast.encode_batch_fast(block, add_special_tokens=inner.include_special_tokens)
        yield from (encoding.ids for encoding in encodings)


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's tokenizer flags."""
    group = parser.add_argument_group("tokenizer (Megatron's own flags)")
    group.add_argument("--tokenizer-type", metavar="TYPE", help=", ".join(REQUIRED))
    group.add_argument(
        "--tokenizer-model", metavar="PATH", help="SentencePiece model, or folder of a Hugging Face tokenizer"
    )
    group.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT-2's BPE, vocab.txt of BERT's WordPiece")
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT-2's BPE")


def options_from(args: argparse.Namespace) -> TokenizerOptions:
    """The tokenizer that the command line asks for. Raises LionError if it names none."""
    if args.tokenizer_type is None:
        raise LionError(f"--tokenizer-type is missing: one of {', '.join(REQUIRED)}")
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    return TokenizerOptions(**{name: getattr(args, name) for name in names})
