"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

from tests.support import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401

# The processes that tests start use this checkout, whichever is installed.
ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of Python's own documentation, as Megatron's indexed dataset with a tokenizer."""
    from tools.corpus import small_corpus

    folder = tmp_path_factory.mktemp("text")
    small_corpus.prepare(folder, vocab_size=512, max_megabytes=0.3)
    return folder
