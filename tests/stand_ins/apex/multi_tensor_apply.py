"""Calls a function for lists of tensors."""

from typing import Any


def multi_tensor_applier(function: Any, noop: Any, lists: Any, *args: Any) -> Any:
    return function(2048 * 32, noop, lists, *args)
