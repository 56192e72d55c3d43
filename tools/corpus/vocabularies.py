"""Train vocabularies that Megatron reads: GPT-2's byte BPE, BERT's word pieces, SentencePiece.

The same texts in the same order give the same files.
"""

import io
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError

END_OF_TEXT = "<|endoftext|>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FILES = {
    "GPT2BPETokenizer": {"--vocab-file": "vocab.json", "--merge-file": "merges.txt"},
    "BertWordPieceLowerCase": {"--vocab-file": "vocab.txt"},
    "BertWordPieceCase": {"--vocab-file": "vocab.txt"},
    "SentencePieceTokenizer": {"--tokenizer-model": "tokenizer.model"},
}


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Return a SentencePiece model (BPE) of exactly ``vocab_size`` pieces, the same bytes for the same texts.

    Any text encodes, as bytes if need be, and decodes to itself (but U+2581, SentencePiece's sign for a space).
    Raises LionError if the texts cannot give a vocabulary of that size.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n")),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",  # this and the next three keep line breaks, indentation, alignment
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,  # longer lines would be silently skipped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise vocabulary_error(str(error), vocab_size) from error
    return model.getvalue()


def vocabulary_error(message: str, vocab_size: int) -> LionError:
    """Return a message for the user about SentencePiece's error."""
    if limit := re.search(r"set it to a value <= (\d+)", message):
        problem, remedy = "too large for this text", f"use --vocab-size {limit[1]} or smaller, or more text"
    elif needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        problem, remedy = "too small for the characters of this text", f"use --vocab-size {needed[1]} or larger"
    else:
        problem, remedy = "refused by SentencePiece", " ".join(message.split())
    return LionError(f"--vocab-size {vocab_size} is {problem}: {remedy}")


def continuations(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Return "##x" for every character x that occurs inside a word, sorted.

    The trainer gets them as its first entries. Otherwise it numbers them in the order of a hash table, which differs in
    each process, and breaks ties by those numbers (tokenizers 0.23, models/bpe/trainer.rs).
    """
    blanks_apart = {word for text in texts for word in tokenizer.normalize(text).split()}
    words = (word for part in blanks_apart for word, _ in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(part))
    return sorted({f"##{character}" for word in words for character in word[1:]})


def train_tokenizers(kind: str, texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write GPT-2's vocab.json and merges.txt, or BERT's vocab.txt, with exactly ``vocab_size`` entries.

    As OpenAI's files, the byte BPE holds the 256 bytes first and <|endoftext|> last. Raises LionError where the text
    gives fewer entries.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise LionError(f"{kind} needs the package tokenizers: pip install transformers") from error
    trained: Any
    if kind == "GPT2BPETokenizer":
        trained = tokenizers.ByteLevelBPETokenizer()
        trained.train_from_iterator(texts, vocab_size=vocab_size - 1, min_frequency=2, show_progress=False)
        trained.add_special_tokens([END_OF_TEXT])
    else:
        trained = tokenizers.BertWordPieceTokenizer(lowercase=kind == "BertWordPieceLowerCase")
        texts = list(texts)
        first = [*BERT_SPECIALS, *continuations(trained, texts)]
        trained.train_from_iterator(
            texts, vocab_size=vocab_size, min_frequency=2, special_tokens=first, show_progress=False
        )
    if (size := trained.get_vocab_size()) != vocab_size:
        way = "smaller" if size < vocab_size else "larger"
        raise LionError(f"--vocab-size {vocab_size}: this text gives {size} entries; use --vocab-size {size} or {way}")
    trained.save_model(str(folder))
    if kind == "GPT2BPETokenizer":  # save_model leaves added tokens out
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        vocabulary[END_OF_TEXT] = vocab_size - 1
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def train(kind: str, texts: Iterable[str], vocab_size: int, output: Path) -> dict[str, Path]:
    """Train a vocabulary into ``output`` and return Megatron's flags for its files.

    Raises LionError where a file of that name is there already, with nothing written.
    """
    flags = {flag: output / name for flag, name in FILES[kind].items()}
    if there := [path for path in flags.values() if path.exists()]:
        raise LionError(f"{there[0]} exists: use another --output, or remove it")
    if not 0 < vocab_size < 2**31:
        raise LionError(f"--vocab-size {vocab_size} is not a possible number of entries: use one like 32000")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as staging:
        if kind == "SentencePieceTokenizer":
            (Path(staging) / "tokenizer.model").write_bytes(train_sentencepiece(texts, vocab_size))
        else:
            train_tokenizers(kind, texts, vocab_size, Path(staging))
        for path in flags.values():
            (Path(staging) / path.name).rename(path)
    return flags
