"""Small vocabularies of each kind, trained on Python's own help, for the tests of what reads and writes text."""

from pathlib import Path

import train_tokenizer

VOCAB_SIZE = 500


def help_documents(step: int = 8) -> list[str]:
    """Every ``step``-th of Python's help topics: real text with lists, code and tables."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)[::step]]


def train(kind: str, folder: Path, vocab_size: int = VOCAB_SIZE) -> dict[str, str]:
    """Train the vocabulary of a tokenizer type into ``folder`` and return Megatron's flags for it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n\n".join(help_documents()), encoding="utf-8")
    assert (
        train_tokenizer.main(
            ["--input", str(text), "--tokenizer-type", kind, "--vocab-size", str(vocab_size), "--output", str(folder)]
        )
        == 0
    )
    if kind == "SentencePieceTokenizer":
        return {"--tokenizer-type": kind, "--tokenizer-model": str(folder / "tokenizer.model")}
    if kind == "GPT2BPETokenizer":
        return {
            "--tokenizer-type": kind,
            "--vocab-file": str(folder / "vocab.json"),
            "--merge-file": str(folder / "merges.txt"),
        }
    return {"--tokenizer-type": kind, "--vocab-file": str(folder / "vocab.txt")}


def flags(tokenizer: dict[str, str]) -> list[str]:
    """The flags as a command line."""
    return [word for pair in tokenizer.items() for word in pair]
