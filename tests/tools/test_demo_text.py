"""tools/demo_text.py on some hundred paragraphs of Python's own help, read back with SentencePiece and Megatron."""

import inspect
import itertools
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import demo_text
import pytest
import sentencepiece
from corpus import documents as documents_of
from corpus.manifest import file_entry
from corpus.splits import SPLITS
from corpus.vocabularies import train_sentencepiece

from megatron_lion.config import LionError

SCRIPT = Path(demo_text.__file__)
VOCAB_SIZE = 400


def run(output: Path, *arguments: object, vocab_size: int = VOCAB_SIZE) -> int:
    """Run the command line in this process and return its exit code."""
    return demo_text.main(["--output", str(output), "--vocab-size", str(vocab_size), *map(str, arguments)])


def file_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def megatron_tokenizer(folder: Path) -> tuple[Any, Namespace]:
    """Return the tokenizer that Megatron builds from its command line, and the arguments as it leaves them."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = Namespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(folder / "tokenizer.model"),
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        chat_template=None,
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=True,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=2,
        rank=0,
    )
    return build_tokenizer(args), args


def megatron_samples(folder: Path) -> list[list[int]]:
    """Return the training samples that Megatron's GPTDataset cuts from the folder, through its index cache."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend_per_split=[([str(folder / f"{split}_text_document")], None) for split in SPLITS],
        tokenizer=megatron_tokenizer(folder)[0],
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [200, 10, 10], lambda: True, config).build()
    return [train[index]["tokens"].tolist() for index in range(200)]


def sequences(folder: Path, split: str) -> list[list[int]]:
    """Return the token numbers of each document (copies: the dataset unmaps its arrays when it goes)."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / f"{split}_text_document"))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1)), "one sequence per document"
    return [dataset[index].tolist() for index in range(len(dataset))]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of real text: every fourth of Python's help topics, with lists, code and tables."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)[::4]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def paragraphs(text: Path) -> list[str]:
    """The file's documents as anybody would find them: lines gathered until a blank one."""
    runs = itertools.groupby(text.read_text(encoding="utf-8").splitlines(), key=lambda line: not line.strip())
    return list(dict.fromkeys("\n".join(lines) for blank, lines in runs if not blank))


@pytest.fixture(scope="module")
def corpus(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    assert run(folder, "--text", text) == 0
    return folder


def test_tokens_read_back_as_the_documents(corpus: Path, paragraphs: list[str]) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    splits = documents_of.split_documents(paragraphs)
    for split, documents in splits.items():
        expected = [[*plain.encode(document), plain.eos_id()] for document in documents]
        assert sequences(corpus, split) == expected
        assert [plain.decode(ids[:-1]) for ids in expected] == documents


def test_end_of_document_is_megatrons(corpus: Path) -> None:
    tokenizer, args = megatron_tokenizer(corpus)
    for split in SPLITS:
        for ids in sequences(corpus, split):
            assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert args.padded_vocab_size == 512, "padded for tensor parallel size 2"
    assert tokenizer.pad < 0, "GPTDataset masks the pad token: no piece may have its number"


def test_splits_are_disjoint_cover_the_text_and_hold_still(paragraphs: list[str]) -> None:
    splits = documents_of.split_documents(paragraphs)
    assert sorted(itertools.chain(*splits.values())) == sorted(paragraphs)
    for split, share in (("train", 0.9), ("valid", 0.05), ("test", 0.05)):
        assert len(splits[split]) / len(paragraphs) == pytest.approx(share, abs=0.03)
    later = documents_of.split_documents(["a new document", *reversed(paragraphs)])
    assert all(set(splits[split]) <= set(later[split]) for split in splits)


def test_manifest_counts_what_was_written(corpus: Path, paragraphs: list[str]) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    for split, documents in documents_of.split_documents(paragraphs).items():
        found = sequences(corpus, split)
        size = sum(len(document.encode()) for document in documents)
        assert manifest["splits"][split] == {"documents": len(found), "bytes": size, "tokens": sum(map(len, found))}
    names = file_contents(corpus).keys() - {"manifest.json"}
    assert manifest["files"] == {name: file_entry(corpus / name) for name in names}
    assert manifest["tokenizer"]["sha256"] == manifest["files"]["tokenizer.model"]["sha256"]


def test_two_runs_write_the_same_bytes(corpus: Path, text: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--text", text) == 0
    assert file_contents(tmp_path) == file_contents(corpus)
    assert len(file_contents(corpus)) == 8 and not list(tmp_path.glob(".*")), "temporary files are gone"


def test_complete_corpus_is_reused_and_force_rebuilds_it(
    corpus: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = corpus / "tokenizer.model"
    before = model.stat().st_ino
    assert run(corpus, "--text", text) == 0
    assert "reusing" in capsys.readouterr().out and model.stat().st_ino == before
    assert run(corpus, "--text", text, "--force") == 0
    assert "reusing" not in capsys.readouterr().out and model.stat().st_ino != before


@pytest.mark.parametrize("damaged", ["train_text_document.bin", "tokenizer.model", "manifest.json"])
def test_truncated_file_is_rebuilt(damaged: str, corpus: Path, text: Path) -> None:
    good = file_contents(corpus)
    (corpus / damaged).write_bytes(good[damaged][:-7])
    assert run(corpus, "--text", text) == 0
    assert file_contents(corpus) == good


def test_changed_text_is_not_taken_for_the_old(text: Path, tmp_path: Path) -> None:
    copy, folder = tmp_path / "copy.txt", tmp_path / "corpus"
    copy.write_bytes(text.read_bytes())
    assert run(folder, "--text", copy) == 0
    copy.write_text(text.read_text(encoding="utf-8").replace("object", "thing"), encoding="utf-8")
    assert run(folder, "--text", copy) == 0
    decoder = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert not any("object" in decoder.decode(ids) for ids in sequences(folder, "train"))


def test_rebuilt_corpus_is_not_read_through_megatrons_old_index(corpus: Path, text: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--text", text, vocab_size=600) == 0
    megatron_samples(tmp_path)
    assert run(tmp_path, "--text", text) == 0
    assert megatron_samples(tmp_path) == megatron_samples(corpus)


def test_refused_rebuild_leaves_the_corpus_alone(corpus: Path, text: Path) -> None:
    good = file_contents(corpus)
    assert run(corpus, "--text", text, vocab_size=10**6) == 2
    assert file_contents(corpus) == good


def test_rebuild_that_breaks_off_halfway_is_not_taken_for_complete(text: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--text", text) == 0
    obstacle = tmp_path / "valid_text_document.idx"
    obstacle.unlink()
    obstacle.mkdir()
    assert run(tmp_path, "--text", text, vocab_size=600) == 2
    assert not (tmp_path / "manifest.json").exists()
    obstacle.rmdir()
    assert run(tmp_path, "--text", text) == 0
    assert megatron_tokenizer(tmp_path)[0].vocab_size == VOCAB_SIZE


def test_any_text_encodes_and_decodes_to_itself(corpus: Path) -> None:
    tokenizer, _ = megatron_tokenizer(corpus)
    for odd in ("", " two  spaces ", "\ttab\n\n  line\r\n", "naïve 漢字 \U0001f981", "a\0b", "</s><unk><0x0A>"):
        ids = tokenizer.tokenize(odd)
        assert tokenizer.detokenize(ids) == odd
        assert not {tokenizer.eod, tokenizer.unk} & set(ids)


def test_max_megabytes_samples_all_of_the_text(paragraphs: list[str]) -> None:
    sample = documents_of.at_most(paragraphs, 0.02)
    places = [paragraphs.index(document) for document in sample]
    assert 15_000 < sum(len(document.encode()) for document in sample) <= 20_000
    assert places == sorted(places) and places[0] < 0.2 * len(paragraphs) and places[-1] > 0.8 * len(paragraphs)


def test_docstrings_come_from_sources_that_are_not_imported(tmp_path: Path) -> None:
    long = "A sentence which is long enough to stay."
    (tmp_path / "b.py").write_text(f'"""{long} b"""\nraise SystemExit\ndef f():\n    """{long}\n\n      in \\d"""\n')
    (tmp_path / "a.py").write_text(f'class A:\n    """{long} a"""\n    def f(self): "Short."\n')
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text(f'"""{long} c"""')
    documents = documents_of.python_documents(tmp_path)
    assert documents[-3:] == [f"{long} a", f"{long} b", f"{long}\n\nin \\d"]
    assert any("The standard type hierarchy" in document for document in documents), "the help topics"
    source = (documents_of.STANDARD_LIBRARY / "json" / "__init__.py").read_bytes()
    assert inspect.cleandoc(json.dumps.__doc__ or "") in documents_of.docstrings(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--text {path}: [Errno 2] No such file or directory"),
        (b"caf\xe9\n", "--text {path}: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        (b" \n\n \n", "only 0 distinct documents, which leaves none for train and valid and test: use a hundred"),
        (b"One.\n\nTwo.\n\nOne.\n", "only 2 distinct documents"),
    ],
)
def test_unusable_text_is_one_clear_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.txt"
    if content:
        path.write_bytes(content)
    assert run(tmp_path / "corpus", "--text", path) == 2
    error = capsys.readouterr().err
    assert message.format(path=path) in error and error.startswith("demo_text.py: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(("vocab_size", "word"), [(10**6, "smaller"), (100, "larger")])
def test_impossible_vocabulary_names_one_that_works(vocab_size: int, word: str, paragraphs: list[str]) -> None:
    with pytest.raises(LionError, match=rf"--vocab-size {vocab_size} .*or {word}") as caught:
        train_sentencepiece(paragraphs, vocab_size)
    advised = int(str(caught.value).split("use --vocab-size ")[1].split()[0])
    model = train_sentencepiece(paragraphs, advised)
    assert sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() == advised


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--vocab-size", "0", "is not a possible number of pieces"),
        ("--max-megabytes", "nan", "is not above zero"),
        ("--max-megabytes", "0.0001", "which leaves none for valid and test: use a larger --max-megabytes"),
    ],
)
def test_impossible_number_is_named(
    option: str, value: str, message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--text", text, option, value) == 2
    error = capsys.readouterr().err
    assert f"{option} {value}" in error and message in error


def test_output_that_is_a_file_is_named(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(text, "--text", text) == 2
    assert f"--output {text}" in capsys.readouterr().err


def test_script_runs_alone(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT)]
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "--max-megabytes" in usage.stdout
    refused = subprocess.run([*command, "--output", "x", "--text", "none.txt"], capture_output=True, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, b"") and b"none.txt" in refused.stderr
