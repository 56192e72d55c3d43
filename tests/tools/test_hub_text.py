"""tools/prepare_text.py --input owner/name: the hub's own client streams from a stand-in for the hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import prepare_text
import pytest
from corpus import sources

from megatron_lion.config import LionError
from tests.tools import vocabularies
from tests.tools.hub import Hub


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return vocabularies.flags(vocabularies.train("GPT2BPETokenizer", tmp_path_factory.mktemp("vocabulary")))


def prepare(name: str, prefix: Path, *more: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command line in a process of its own: the client reads HF_ENDPOINT when it is imported."""
    line = [sys.executable, prepare_text.__file__, "--input", name, "--output-prefix", str(prefix), "--workers", "1"]
    path = {"HF_HOME": str(prefix.parent / "cache"), **environment}
    return subprocess.run([*line, *more], capture_output=True, text=True, timeout=300, env={**os.environ, **path})


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed_and_gives_its_files_tokens(gpt2: list[str], tmp_path: Path) -> None:
    documents = vocabularies.help_documents(step=4)
    folder, (train, test) = tmp_path / "owner-name", (documents[:-3], documents[-3:])
    folder.mkdir()
    halves = {"train-00000-of-00002": train[:9], "train-00001-of-00002": train[9:], "test-00000-of-00001": test}
    for part, texts in halves.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with Hub(folder) as hub:
        done = prepare("owner/name", tmp_path / "o" / "hub", *gpt2, HF_ENDPOINT=hub.endpoint)
        assert done.returncode == 0, done.stderr[-3000:]
    assert {name for name, _ in hub.ranges} == {f"{part}.jsonl" for part in halves if part.startswith("train")}
    assert not list((tmp_path / "o" / "cache").rglob("*.jsonl")), "nothing was downloaded whole"

    local = tmp_path / "train.jsonl"
    local.write_text("".join((folder / f"{part}.jsonl").read_text() for part in list(halves)[:2]))
    line = ["--input", str(local), "--output-prefix", str(tmp_path / "o" / "file"), "--workers", "1"]
    assert prepare_text.main([*line, *gpt2]) == 0
    for suffix in ("bin", "idx"):
        hubs, files = (tmp_path / "o" / f"{kind}_text_document.{suffix}" for kind in ("hub", "file"))
        assert hubs.read_bytes() == files.read_bytes()


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_named_with_what_to_do(gpt2: list[str], tmp_path: Path) -> None:
    """A minute: the hub's client tries five times."""
    done = prepare("owner/name", tmp_path / "x", *gpt2, HF_ENDPOINT="http://127.0.0.1:9")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert "--input owner/name cannot be loaded as a data set: Couldn't reach 'owner/name' on the Hub" in last
    assert last.endswith("save_to_disk made elsewhere")
    assert not list(tmp_path.glob("x_*"))


def test_what_the_client_says_is_one_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(no network)")

    def cut_off() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(LionError, match=r"owner/name cannot be loaded .*Couldn't reach.* HF_ENDPOINT .* save_to_disk"):
        next(sources.dataset_texts("owner/name", "train", "text"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: cut_off())
    texts = sources.dataset_texts("owner/name", "train", "text")
    assert next(texts) == b"one"
    with pytest.raises(LionError, match=r"owner/name .* after 1 .*Server Disconnected.*same command again"):
        next(texts)
    with pytest.raises(LionError, match=r"no column 'body': choose one with --json-keys \(text\)"):
        next(sources.dataset_texts("owner/name", "train", "body"))
