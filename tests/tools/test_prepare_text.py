"""tools/prepare_text.py on Python's own help: tokens, bytes, splits, kills, bad input, and Megatron's own builder."""

import codecs
import gzip
import json
import multiprocessing
import os
import time
from argparse import Namespace
from pathlib import Path

import numpy
import prepare_text
import pytest
from corpus import manifest, shards, sources, splits
from corpus.sentences import split_sentences

from megatron_lion.config import LionError
from tests.tools import vocabularies

SMALL = ("--shard-megabytes", "0.02")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Real documents, one of them twice, one empty."""
    parts = [part for topic in vocabularies.help_documents(step=2) for part in topic.split("\n\n\n")]
    return [*parts, parts[3], ""]


@pytest.fixture(scope="module")
def source(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "help.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(documents)))
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("vocabularies")
    kinds = ("GPT2BPETokenizer", "SentencePieceTokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")
    made = {kind: vocabularies.train(kind, folder / kind) for kind in kinds}
    hub = folder / "hub"
    hub.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (hub / name).write_bytes((folder / "GPT2BPETokenizer" / name).read_bytes())
    (hub / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    made["HuggingFaceTokenizer"] = {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": str(hub)}
    return made


@pytest.fixture(scope="module")
def gpt2(tokenizers: dict[str, dict[str, str]]) -> list[str]:
    return vocabularies.flags(tokenizers["GPT2BPETokenizer"])


def run(source: Path, prefix: Path, *more: str) -> int:
    return prepare_text.main(["--input", str(source), "--output-prefix", str(prefix), "--workers", "1", *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def sequences(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    return [data[index].tolist() for index in range(len(data))]


def megatron_tokenizer(tokenizer: dict[str, str]):
    """The tokenizer of Megatron's own factory, told to leave BERT's special tokens out, as preprocessing must."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from megatron_lion.integration.loop.vocabularies import use_local_vocabularies

    use_local_vocabularies()
    given = {flag.removeprefix("--").replace("-", "_"): value for flag, value in tokenizer.items()}
    args = Namespace(
        **{"vocab_file": None, "merge_file": None, "tokenizer_model": None, **given},
        special_tokens=None, metadata_path=None, chat_template=None, trust_remote_code=False, pad_vocab_size=False,
        tokenizer_hf_no_use_fast=False, tokenizer_hf_no_include_special_tokens="Bert" in given["tokenizer_type"],
        tokenizer_sentencepiece_ignore_extra_whitespaces=True, tokenizer_sentencepiece_legacy=False,
    )  # fmt: skip
    return build_tokenizer(args)


@pytest.mark.parametrize(
    "kind",
    [
        "GPT2BPETokenizer",
        "SentencePieceTokenizer",
        "BertWordPieceLowerCase",
        "BertWordPieceCase",
        "HuggingFaceTokenizer",
    ],
)
def test_every_token_reads_back_as_the_tokenizers_own(
    kind: str, tokenizers: dict[str, dict[str, str]], documents: list[str], source: Path, tmp_path: Path
) -> None:
    bert = ["--split-sentences"] if kind.startswith("Bert") else []
    assert run(source, tmp_path / "x", "--append-eod", *SMALL, *bert, *vocabularies.flags(tokenizers[kind])) == 0
    tokenizer = megatron_tokenizer(tokenizers[kind])
    expected = []
    for text in documents:
        ids = [tokenizer.tokenize(part) for part in (split_sentences(text) if bert else [text])]
        ids = [part for part in ids if part]
        if ids:
            ids[-1] = [*ids[-1], tokenizer.eod]
        expected += ids
    assert sequences(tmp_path / ("x_text_sentence" if bert else "x_text_document")) == expected
    if kind == "GPT2BPETokenizer":
        found = sequences(tmp_path / "x_text_document")
        assert [tokenizer.detokenize(ids[:-1]) for ids in found] == [text for text in documents if text]
        assert all(ids[-1] == tokenizer.eod == vocabularies.VOCAB_SIZE - 1 for ids in found)


def test_the_files_are_those_of_megatrons_own_builder(gpt2: list[str], source: Path, tmp_path: Path) -> None:
    """Joined shards equal one IndexedDatasetBuilder fed document by document, as preprocess_data.py feeds it."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    assert run(source, tmp_path / "x", "--split-sentences", *SMALL, *gpt2) == 0
    made = IndexedDataset(str(tmp_path / "x_text_sentence"))
    builder = IndexedDatasetBuilder(str(tmp_path / "one.bin"), dtype=numpy.uint16)
    for begin, end in zip(made.document_indices[:-1], made.document_indices[1:], strict=True):
        group = [made[index] for index in range(begin, end)]
        builder.add_document(numpy.concatenate(group), [len(part) for part in group])
    builder.finalize(str(tmp_path / "one.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"x_text_sentence{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()
    assert len(made) > 5 * len(made.document_indices) > 500


def test_one_worker_and_four_write_the_same_bytes(gpt2: list[str], source: Path, tmp_path: Path) -> None:
    options = ("--split", "18,1,1", "--append-eod", *SMALL, *gpt2)
    assert run(source, tmp_path / "one" / "x", *options) == 0
    assert run(source, tmp_path / "four" / "x", *options, "--workers", "4") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "four")
    assert len(contents(tmp_path / "one")) == 7 and not list(tmp_path.glob("*/*.shards"))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_kill_at_any_moment_then_the_same_command_gives_the_same_files(
    workers: str, gpt2: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--split", "18,1,1", *SMALL, *gpt2, "--workers", workers)
    assert run(source, tmp_path / "whole" / "x", *options) == 0
    folder = tmp_path / "killed"
    total = len(
        list(shards.cut(sources.find_sources([str(source)], key="text", documents="line", dataset_split=""), 20_000))
    )
    assert total > 10
    for moment in (1, total // 2, total):  # the last one is inside the joining, or just behind it
        process = multiprocessing.get_context("fork").Process(target=run, args=(source, folder / "x", *options))
        process.start()
        deadline = time.monotonic() + 60
        while (
            len(list(folder.glob("x.shards/0*.json"))) < moment and time.monotonic() < deadline and process.is_alive()
        ):
            time.sleep(0.002)
        process.kill()
        process.join()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("x.shards/0*.json")}
    assert run(source, folder / "x", *options) == 0
    assert contents(folder) == contents(tmp_path / "whole")
    said = capsys.readouterr().out
    assert not before or f"{len(before)} finished shards kept" in said or len(before) < total


def test_finished_shards_are_not_done_again_and_a_damaged_one_is(
    gpt2: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(source, tmp_path / "whole" / "x", *SMALL, *gpt2) == 0
    monkeypatch.setattr(prepare_text, "finish", lambda *_: pytest.fail("killed before joining"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        run(source, tmp_path / "x", *SMALL, *gpt2)
    monkeypatch.undo()
    damaged = sorted((tmp_path / "x.shards").glob("*.bin"))[2]
    damaged.write_bytes(damaged.read_bytes()[:-2])
    made = []
    write = shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda shard, *rest: made.append(shard.index) or write(shard, *rest))
    assert run(source, tmp_path / "x", *SMALL, *gpt2) == 0
    assert made == [2]
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_the_split_is_each_documents_own_and_covers_the_corpus(
    gpt2: list[str], tokenizers: dict[str, dict[str, str]], documents: list[str], source: Path, tmp_path: Path
) -> None:
    assert run(source, tmp_path / "x", "--split", "6,3,1", *SMALL, *gpt2) == 0
    tokenizer = megatron_tokenizer(tokenizers["GPT2BPETokenizer"])
    for part in splits.SPLITS:
        expected = [text for text in documents if text and splits.split_of(text, (6, 3, 1)) == part]
        assert [tokenizer.detokenize(ids) for ids in sequences(tmp_path / f"x_{part}_text_document")] == expected
    shares = [splits.split_of(f"{n}", (6, 3, 1)) for n in range(10_000)]
    assert [round(shares.count(part) / 1000) for part in splits.SPLITS] == [6, 3, 1]


def test_bad_lines_are_counted_reported_and_skipped_or_stop_with_strict(
    gpt2: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    good = [json.dumps({"text": text}).encode() for text in vocabularies.help_documents(40)]
    bad = [b'{"text": "cut', b"\xff\xfe", b'{"other": 1}', b'{"text": 5}', b"[1]", b'{"text": "\\ud800"}', b""]
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:]]) + b"\n")
    assert run(path, tmp_path / "x", *gpt2) == 0
    counted = manifest.read_manifest(tmp_path / "x")
    assert counted["skipped"] == {
        "not JSON": 1,
        "not UTF-8": 1,
        "no 'text'": 2,
        "'text' is not a string": 1,
        "not Unicode": 1,
    }
    assert counted["counts"]["all"]["documents"] == len(good)
    said = capsys.readouterr().out
    assert f"{path}, line 2: not JSON" in said and "1 not UTF-8" in said
    with pytest.raises(LionError, match=rf"{path}, line 2: not JSON\. Fix it"):
        run(path, tmp_path / "y", "--strict", *gpt2)
    with pytest.raises(LionError, match="line 2: not JSON"):
        run(path, tmp_path / "z", "--strict", "--workers", "2", *gpt2)
    assert not list(tmp_path.glob("y_*")) and not list(tmp_path.glob("z_*"))


def test_each_kind_of_file_holds_the_same_documents(
    gpt2: list[str], source: Path, documents: list[str], tmp_path: Path
) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet
    import zstandard

    given = tmp_path / "given"
    given.mkdir()
    raw = source.read_bytes()
    middle = raw.index(b"\n", len(raw) // 2) + 1
    (given / "a.jsonl.gz").write_bytes(gzip.compress(raw[:middle]) + gzip.compress(raw[middle:]))
    frames = zstandard.ZstdCompressor()
    (given / "b.jsonl.zst").write_bytes(frames.compress(raw[:middle]) + frames.compress(raw[middle:]))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), given / "c.parquet", row_group_size=100)
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(given / "saved"))
    assert run(source, tmp_path / "o" / "plain", *gpt2) == 0
    expected = (tmp_path / "o" / "plain_text_document.bin").read_bytes()
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.parquet", "saved"):
        assert run(given / name, tmp_path / "o" / name, *SMALL, *gpt2) == 0, name
        assert (tmp_path / "o" / f"{name}_text_document.bin").read_bytes() == expected, name
    (given / "saved" / "dataset_info.json").rename(tmp_path / "info")
    for path in (given / "saved").iterdir():
        path.unlink()
    assert run(given, tmp_path / "o" / "folder", *gpt2) == 0
    assert (tmp_path / "o" / "folder_text_document.bin").read_bytes() == 3 * expected


def test_one_read_goes_on_over_the_end_of_a_zstd_frame(source: Path, tmp_path: Path) -> None:
    """As pzstd and `zstd --append` write files. zstandard alone promises no more than the first frame to one read."""
    import zstandard

    whole = source.read_bytes()[:50_000]
    frames = zstandard.ZstdCompressor()
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"".join(frames.compress(part) for part in (whole[:20_000], b"", whole[20_000:])))
    with path.open("rb") as raw, sources.unpacked(raw, path.name) as stream:
        assert stream.read1(len(whole)) == whole  # type: ignore[attr-defined]


def test_plain_text_falls_into_documents_by_the_rule_asked_for() -> None:
    text = [
        b" = Title = \n",
        b" \n",
        b" One . \n",
        b" = = Section = = \n",
        b" Two . \n",
        b" = Other = \n",
        b" Three . \n",
    ]
    cut = {rule: list(sources.plain_documents(text, rule)) for rule in sources.DOCUMENT_RULES}
    assert cut["line"] == [line.rstrip(b"\n") for line in text]
    assert cut["blank-line"] == [b" = Title = ", b"".join(text[2:]).rstrip(b"\n")]
    assert cut["wikitext"] == [b"".join(text[:5]).rstrip(b"\n"), b"".join(text[5:]).rstrip(b"\n")]


BOM = codecs.BOM_UTF8


@pytest.mark.parametrize("packing", ["", ".gz", ".GZ", ".Zst"])
def test_byte_order_marks_and_packings_in_capitals_leave_the_same_documents(
    packing: str, gpt2: list[str], tmp_path: Path
) -> None:
    """A mark begins each file, and a line where files were put together; one in a text is dropped at its beginning."""
    import zstandard

    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing.lower()]
    texts = [f"Document {n}.\nIts second line." for n in range(6)]
    plain = [text.encode() for text in texts]
    lines = [json.dumps({"text": text.decode()}).encode() for text in plain]
    marked = [json.dumps({"text": f"\ufeff{text.decode()}"}).encode() for text in plain]
    given = {
        "plain.jsonl": b"\n".join(lines),
        "marked.jsonl": BOM + lines[0] + b"\r\n" + BOM + b"\n".join(lines[1:]),
        "inside.JSONL": b"\n".join(marked),
        "plain.txt": b"\n\n".join(plain),
        "marked.txt": BOM + b"\n\n".join(plain[:2]) + b"\n\n" + BOM + b"\n\n".join(plain[2:]),
        "empty_first.TXT": BOM + b"\n" + b"\n\n".join(plain),
    }
    expected = None
    for name, content in given.items():
        (tmp_path / f"{name}{packing}").write_bytes(pack(content))
        prefix = tmp_path / name.replace(".", "_")
        assert run(tmp_path / f"{name}{packing}", prefix, "--strict", *gpt2) == 0
        made = Path(f"{prefix}_text_document.bin").read_bytes()
        expected = expected or made
        assert made == expected, name
        assert manifest.read_manifest(prefix)["counts"]["all"]["documents"] == len(texts)


def test_a_tokenizer_that_ends_each_text_itself_ends_a_document_once(tmp_path: Path) -> None:
    """And what it adds to a blank text is no document."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "there": 4, ".": 5, "Hello": 6}
    made = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    folder = tmp_path / "hub"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("hello there", "", " ", "hello. Hello.")))
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), "--append-eod")
    assert run(path, tmp_path / "x", *flags) == 0
    assert sequences(tmp_path / "x_text_document") == [[1, 3, 4, 2], [1, 3, 5, 6, 5, 2]]
    assert manifest.read_manifest(tmp_path / "x")["skipped"] == {"empty": 2}
    assert run(path, tmp_path / "y", *flags, "--split-sentences") == 0
    assert sequences(tmp_path / "y_text_sentence") == [[1, 3, 4, 2], [1, 3, 5, 2], [1, 6, 5, 2]]


def test_utf_16_is_named(gpt2: list[str], tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-be"):
        path = tmp_path / f"{encoding}.jsonl"
        path.write_bytes((codecs.BOM_UTF16_BE if encoding.endswith("be") else b"") + '{"text": "a"}\n'.encode(encoding))
        with pytest.raises(LionError, match=rf"{encoding}.jsonl is UTF-16, not UTF-8: convert it"):
            run(path, tmp_path / "x", *gpt2)
        prepare_text.shutil.rmtree(tmp_path / "x.shards")


def test_a_vocabulary_with_a_byte_order_mark_is_the_same_tokenizer(
    tokenizers: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    for kind in ("GPT2BPETokenizer", "BertWordPieceLowerCase"):
        plain = tokenizers[kind]
        marked = dict(plain)
        for flag in ("--vocab-file", "--merge-file"):
            if flag in plain:
                marked[flag] = str(tmp_path / f"{kind}{flag}")
                Path(marked[flag]).write_bytes(BOM + Path(plain[flag]).read_bytes())
        text = vocabularies.help_documents(40)[0]
        assert megatron_tokenizer(marked).tokenize(text) == megatron_tokenizer(plain).tokenize(text)


def test_sentences_end_where_a_reader_ends_them() -> None:
    text = 'Dr. Smith left at 5 p.m. on Monday. "Why?" he asked. J. R. R. Tolkien wrote it (see Fig. 3). Yes\nit is so!'
    assert split_sentences(text + "\n\nNo full stop") == [
        "Dr. Smith left at 5 p.m. on Monday.",
        '"Why?" he asked.',
        "J. R. R. Tolkien wrote it (see Fig. 3).",
        "Yes it is so!",
        "No full stop",
    ]
    topic = vocabularies.help_documents()[0]
    assert "".join("".join(split_sentences(topic)).split()) == "".join(topic.split())


def test_a_complete_corpus_is_kept_and_another_is_not_overwritten(
    gpt2: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "x", *gpt2) == 0
    good = contents(tmp_path)
    assert run(source, tmp_path / "x", *gpt2) == 0
    assert "complete already" in capsys.readouterr().out
    for more in (["--append-eod"], ["--dataset-split", "test"], ["--text-documents", "line"]):
        with pytest.raises(LionError, match="belongs to a corpus with other settings"):
            run(source, tmp_path / "x", *more, *gpt2)
    (tmp_path / "x_manifest.json").unlink()
    with pytest.raises(LionError, match=r"x_text_document\.bin was not written by this tool"):
        run(source, tmp_path / "x", *gpt2)
    assert contents(tmp_path) == {name: content for name, content in good.items() if "manifest" not in name}


def test_a_text_that_was_edited_is_noticed_and_a_copy_is_not(
    gpt2: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(source.read_bytes())
    assert run(path, tmp_path / "x", *SMALL, *gpt2) == 0
    os.utime(path, ns=(1, 1))  # as a copy or a checkout leaves it
    assert run(path, tmp_path / "x", *SMALL, *gpt2) == 0
    assert "complete already" in capsys.readouterr().out
    text = path.read_bytes()
    at = text.index(b"the")
    path.write_bytes(text[:at] + b"THE" + text[at + 3 :])  # the same size
    good = contents(tmp_path)
    with pytest.raises(LionError, match=r"the text was changed after .*x_manifest\.json was written: use another"):
        run(path, tmp_path / "x", *SMALL, *gpt2)
    assert contents(tmp_path) == good


def test_a_saved_data_set_that_was_made_again_is_noticed(gpt2: list[str], tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    for texts in (["one two"], ["two one"]):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder))
        if texts == ["one two"]:
            assert run(folder, tmp_path / "x", *gpt2) == 0
    with pytest.raises(LionError, match="the text was changed after"):
        run(folder, tmp_path / "x", *gpt2)


def test_verify_finds_truncation_another_content_and_the_wrong_tokenizer(
    gpt2: list[str],
    tokenizers: dict[str, dict[str, str]],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(source, tmp_path / "x", *gpt2) == 0
    check = ["--output-prefix", str(tmp_path / "x"), "--verify"]
    assert prepare_text.main([*check, *gpt2]) == 0
    other = vocabularies.flags(tokenizers["SentencePieceTokenizer"])
    assert prepare_text.main([*check, *other]) == 1
    assert "the corpus was made with GPT2BPETokenizer vocab.json and merges.txt" in capsys.readouterr().err
    path = tmp_path / "x_text_document.bin"
    whole = path.read_bytes()
    for damage, message in (
        (whole[:-2], "the manifest says"),
        (whole[:-1] + b"\x7f", "does not match"),
        (None, "is missing"),
    ):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        assert prepare_text.main(check) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "none.json"],
            "--vocab-file none.json does not exist",
        ),
        (["--tokenizer-type", "GPT2BPETokenizer"], "needs --vocab-file.*tools/train_tokenizer.py makes one"),
        (["--tokenizer-type", "GPT2BPE"], "did you mean 'GPT2BPETokenizer'"),
        ([], "--tokenizer-type is missing"),
        (["--split", "1,2"], "--split 1,2 is not three whole numbers"),
        (["--split", "100000,1,1"], "no document for"),
        (["--shard-megabytes", "0"], "must be above zero"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--input", __file__], "unknown kind of file"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(
    more: list[str], message: str, gpt2: list[str], source: Path, tmp_path: Path
) -> None:
    tokenizer = [] if "type is missing" in message or "--tokenizer-type" in more else gpt2
    with pytest.raises(LionError, match=message):
        run(source, tmp_path / "x", *tokenizer, *more)
    assert not list(tmp_path.glob("x_*"))


def test_a_packed_file_that_was_cut_short_is_an_error(gpt2: list[str], source: Path, tmp_path: Path) -> None:
    import zstandard

    whole = source.read_bytes()
    for name, packed in (("x.jsonl.gz", gzip.compress(whole)), ("y.jsonl.zst", zstandard.compress(whole)[::-1])):
        (tmp_path / name).write_bytes(packed[:-2000])
        with pytest.raises(LionError, match=rf"{name} is damaged"):
            run(tmp_path / name, tmp_path / "o", *gpt2)
        assert not list(tmp_path.glob("o_*"))
        prepare_text.shutil.rmtree(tmp_path / "o.shards")
