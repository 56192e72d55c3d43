"""Which files next to the data are manifests of tools/prepare_text.py, and which are somebody else's."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.config import LionError
from megatron_lion.integration.loop.vocabularies import check_data_manifests, tokenizer_sha256

pytest.importorskip("megatron.training", reason="Megatron's training loop")


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    """Arguments with one data prefix, ``help_train_text_document``. Each of its two files has 8 bytes."""
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    for suffix in ("bin", "idx"):
        (tmp_path / f"help_train_text_document.{suffix}").write_bytes(bytes(8))
    return Namespace(
        data_path=[str(tmp_path / "help_train_text_document")], train_data_path=None, valid_data_path=None,
        test_data_path=None, data_args_path=None, per_split_data_args_path=None,
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.model"),
    )  # fmt: skip


def ours(args: Namespace, **changed: Any) -> dict[str, Any]:
    sizes = {f"help_train_text_document.{suffix}": {"bytes": 8} for suffix in ("bin", "idx")}
    made_with = {"sha256": tokenizer_sha256(args), "type": args.tokenizer_type, "files": ["tokenizer.model"]}
    return {"files": sizes, "tokenizer": made_with} | changed


@pytest.mark.parametrize(
    "content",
    [
        {"version": 1},
        [],
        "text",
        None,
        {"files": ["a.bin"], "tokenizer": {}},
        {"files": {"help_train_text_document.bin": 1}},
    ],
)
def test_files_of_others_are_left_alone(args: Namespace, tmp_path: Path, content: Any) -> None:
    for name in ("help_manifest.json", "images_manifest.json"):
        (tmp_path / name).write_text(json.dumps(content))
    check_data_manifests(args)


def test_a_file_that_cannot_be_read_is_an_error_only_if_it_has_our_prefix(args: Namespace, tmp_path: Path) -> None:
    for text in ("", "{", "\udcff"):
        damaged = tmp_path / "images_manifest.json"
        damaged.write_bytes(text.encode(errors="surrogateescape"))
        check_data_manifests(args)
        damaged = damaged.rename(tmp_path / "help_manifest.json")
        with pytest.raises(LionError, match=r"help_manifest\.json cannot be read: .*[Pp]repare the text again"):
            check_data_manifests(args)
        damaged.unlink()


def test_a_manifest_without_an_entry_that_is_needed_is_named(args: Namespace, tmp_path: Path) -> None:
    sizes = ours(args)["files"]
    whole = tmp_path / "help_manifest.json"
    for changed in (
        {"files": {"help_train_text_document.bin": {"bytes": 8}}},
        {"files": sizes | {"help_train_text_document.idx": {"sha256": ""}}},
        {"files": sizes | {"help_train_text_document.idx": 8}},
        {"tokenizer": {"sha256": "0"}},
        {"tokenizer": {}},
    ):
        whole.write_text(json.dumps(ours(args, **changed)))
        with pytest.raises(LionError, match=r"help_manifest\.json is incomplete.*[Pp]repare the text again"):
            check_data_manifests(args)
    whole.write_text(json.dumps(ours(args)))
    check_data_manifests(args)
