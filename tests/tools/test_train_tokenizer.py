"""tools/train_tokenizer.py: vocabularies that Megatron reads, of exactly the size asked for, the same each time."""

import json
from pathlib import Path

import pytest
import train_tokenizer
from corpus.vocabularies import FILES

from megatron_lion.config import LionError
from tests.tools import vocabularies

KINDS = ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase", "SentencePieceTokenizer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_has_the_size_asked_for_and_is_the_same_each_time(kind: str, tmp_path: Path) -> None:
    from corpus.tokenizers import TokenizerOptions

    made = [vocabularies.train(kind, tmp_path / name) for name in ("one", "two")]
    for name in FILES[kind].values():
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    options = {flag.removeprefix("--").replace("-", "_"): value for flag, value in made[0].items()}
    tokenizer = TokenizerOptions(**options).build()
    # Megatron adds 100 <extra_id_N> to the cased BERT vocabulary (build_tokenizer 51).
    assert tokenizer.vocab_size == vocabularies.VOCAB_SIZE + (100 if kind == "BertWordPieceCase" else 0)
    assert not list((tmp_path / "one").glob(".*"))
    ids = tokenizer.tokenize("Hello there, a class or a Module.")
    if kind.startswith("Bert"):
        specials = [tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask]
        assert specials == [0, 1, 2, 3, 4] and not {2, 3} & set(ids)
        assert ("hello" in tokenizer.detokenize(ids)) == (kind == "BertWordPieceLowerCase")
    else:
        odd = ' two  spaces\n\ttab "quoted" na\u00efve \u6f22\u5b57 \U0001f981 '
        assert tokenizer.detokenize(tokenizer.tokenize(odd)) == odd


def test_gpt2s_files_have_openais_layout(tmp_path: Path) -> None:
    """256 bytes first, in OpenAI's order, then one entry a merge, then <|endoftext|>: as its vocab.json of 50,257."""
    vocabularies.train("GPT2BPETokenizer", tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert [vocabulary[sign] for sign in ("!", "A", "~", "\u00a1")] == [0, 32, 93, 94]
    merges = [line for line in (tmp_path / "merges.txt").read_text().splitlines() if not line.startswith("#version")]
    assert len(merges) == vocabularies.VOCAB_SIZE - 257
    for place, pair in enumerate(merges):
        assert vocabulary[pair.replace(" ", "")] == 256 + place
    assert vocabulary["<|endoftext|>"] == vocabularies.VOCAB_SIZE - 1 == len(vocabulary) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_the_text_cannot_give_names_one_that_works(kind: str, tmp_path: Path) -> None:
    with pytest.raises(LionError, match=r"--vocab-size 1000000.*use --vocab-size \d+") as caught:
        vocabularies.train(kind, tmp_path, vocab_size=1_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    advised = int(str(caught.value).split("use --vocab-size ")[1].split()[0])
    vocabularies.train(kind, tmp_path, vocab_size=advised)


def test_a_vocabulary_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    vocabularies.train("BertWordPieceCase", tmp_path)
    before = (tmp_path / "vocab.txt").read_bytes()
    with pytest.raises(LionError, match=r"vocab\.txt exists"):
        vocabularies.train("BertWordPieceLowerCase", tmp_path)
    assert (tmp_path / "vocab.txt").read_bytes() == before


def test_training_stops_at_max_megabytes(tmp_path: Path) -> None:
    from corpus import sources

    path = tmp_path / "text.txt"
    path.write_text("a" * 600 + "\n\n" + "b" * 600 + "\n\n" + "c" * 600)
    found = sources.find_sources([str(path)], key="text", documents="blank-line", dataset_split="train")
    assert [text[0] for text in train_tokenizer.documents(found, "text", 0.0015)] == ["a", "b"]
