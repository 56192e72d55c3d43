"""The examples in docstrings run as written."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["megatron_lion.lion", "megatron_lion.stats.full_gradient"])
def test_the_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
