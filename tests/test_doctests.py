"""The examples in docstrings run as written."""

import doctest
import importlib

import pytest

MODULES = (
    "megatron_lion.lion",
    "megatron_lion.stats.full_gradient",
    "tools.paper.theory.bounds",
    "tools.paper.theory.records",
)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
