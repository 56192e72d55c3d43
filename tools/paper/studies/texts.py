"""The text of the studies' own runs: made once in a folder, and Megatron's flags for it."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_lion.config import LionError
from tools.corpus import documents, small_corpus, vocabularies
from tools.corpus.splits import SPLITS

PREPARE_TEXT = Path(__file__).resolve().parents[2] / "prepare_text.py"
VOCABULARY = 384  # three times 128, so that no row is padding
WORD_PIECES = "BertWordPieceLowerCase"


def gpt(folder: Path, text: Sequence[Path]) -> str:
    """Documents as tools/demo_text.py makes them of ``text``, or of Python's documentation if there is none."""
    small_corpus.prepare(folder, VOCABULARY, None, text)
    tokenizer = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {folder}/tokenizer.model"
    return f"{tokenizer} {_data(folder / '{}_text_document')}"


def bert(folder: Path, text: Sequence[Path]) -> str:
    """The same documents as sentences, with a vocabulary of word pieces trained on them, in a folder named by them."""
    found = list(dict.fromkeys(documents.read_documents(text)))
    lines = "".join(json.dumps({"text": document}) + "\n" for document in found)
    folder = folder / hashlib.sha256(lines.encode("utf-8")).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    source, vocabulary = folder / "documents.jsonl", folder / "vocab.txt"
    source.write_text(lines, encoding="utf-8")
    if not vocabulary.is_file():
        vocabularies.train(WORD_PIECES, found, VOCABULARY, folder)
    tokenizer = ["--tokenizer-type", WORD_PIECES, "--vocab-file", str(vocabulary)]
    where = ["--input", str(source), "--output-prefix", str(folder / "text"), "--workers", "1"]
    sentences = ["--split-sentences", "--split", ",".join(map(str, documents.SHARES))]
    if subprocess.run([sys.executable, str(PREPARE_TEXT), *where, *tokenizer, *sentences], check=False).returncode:
        raise LionError(f"tools/prepare_text.py could not prepare {source}; its error is above")
    return f"{' '.join(tokenizer)} {_data(folder / 'text_{}_text_sentence')}"


def _data(pattern: Path) -> str:
    return " ".join(f"--{split}-data-path {str(pattern).format(split)}" for split in SPLITS)


CORPORA: dict[str, Callable[[Path, Sequence[Path]], str]] = {"gpt": gpt, "bert": bert}
