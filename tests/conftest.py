"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
from support import pytest_addoption, pytest_configure  # noqa: F401


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of Python's own documentation, as Megatron's indexed dataset with a tokenizer."""
    import demo_text

    folder = tmp_path_factory.mktemp("text")
    demo_text.prepare(folder, vocab_size=512, max_megabytes=0.3)
    return folder
