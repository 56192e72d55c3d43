"""``fsdp_dtensor`` checkpoints, Megatron-FSDP's format, with Lion's state.

Line numbers are megatron-core 0.19.2's.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import integrity

SECOND_MOMENT = "exp_avg_sq"


def split_fused_parameters(
    stock: Callable[..., Any], model: Any, model_state: Any, optimizer_state: dict[str, Any] | None
) -> Any:
    """Let Megatron split the state of fused parameters, such as swiglu's, where it has no second moment.

    Stock splits both moments of each parameter (fsdp_dtensor_checkpoint 372, 557). The second one is here another name
    of the first, which is taken away again.
    """
    states = optimizer_state["state"] if optimizer_state else {}
    if not all("exp_avg" in tensors and SECOND_MOMENT not in tensors for tensors in states.values()) or not states:
        return stock(model, model_state, optimizer_state)
    twice = {name: {**tensors, SECOND_MOMENT: tensors["exp_avg"]} for name, tensors in states.items()}
    model_state, split = stock(model, model_state, {**(optimizer_state or {}), "state": twice})
    for tensors in split["state"].values():
        del tensors[SECOND_MOMENT]
    return model_state, split


_PATCHED = "megatron.core.transformer.fsdp_dtensor_checkpoint"
CORE = (
    compat.wrap(
        f"{_PATCHED}:handle_swiglu_in_state_dict",
        split_fused_parameters,
        parameters=("model", "model_state_dict", "optimizer_state_dict"),
    ),
    compat.wrap(
        f"{_PATCHED}:handle_gdn_in_state_dict",
        split_fused_parameters,
        parameters=("model", "model_state_dict", "optimizer_state_dict"),
        since="0.18",
    ),
)


def is_registered() -> bool:
    """Whether Megatron calls :func:`split_fused_parameters`."""
    from megatron.core.transformer import fsdp_dtensor_checkpoint

    return hasattr(fsdp_dtensor_checkpoint.handle_swiglu_in_state_dict, "wrapper")


@contextlib.contextmanager
def records_checked() -> Iterator[None]:
    """Let the reader of these checkpoints check each record that it reads; Megatron looks it up in torch (1776)."""

    def reader(*args: Any, **kwargs: Any) -> Any:
        return integrity.with_checks(FileSystemReader(*args, **kwargs))

    with compat.temporarily(checkpoint, FileSystemReader=reader):
        yield


def ask_for_adams_state(request: dict[str, Any], init_from: str) -> dict[str, Any]:
    """The ``request`` for a checkpoint's tensors, for one with Adam's state (``--lion-init-from``).

    Without the settings of parameter groups, which are this run's, and with ``fresh`` without the momentum.
    """
    optimizer = {**request["optimizer"], "param_to_group_meta": {}}
    if init_from == "fresh":
        optimizer["state"] = {}
    return {**request, "optimizer": optimizer}
