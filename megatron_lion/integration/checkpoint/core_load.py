"""One-line errors around ``megatron.core.dist_checkpointing.load``, which every loop and framework calls."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import formats, integrity

# The optimizer that has these kinds of momentum.
OWNERS = {
    frozenset({"exp_avg"}): "lion",
    frozenset({"exp_avg", "exp_avg_sq"}): "adam",
    frozenset({"momentum_buffer"}): "sgd",
}


def load(stock: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """Load, and turn an error into a LionError if a file cannot be read or another optimizer wrote the state."""
    requested = formats.kinds_of_momentum(_keys(sharded_state_dict))
    try:
        return stock(sharded_state_dict, checkpoint_dir, *args, **kwargs)
    except LionError:
        raise
    except (Exception, CheckpointException) as error:
        folder = Path(checkpoint_dir)
        if problem := integrity.read_problem(error, folder) or _other_owner(requested, folder):
            raise LionError(problem) from error
        raise


CORE = (
    compat.wrap(
        "megatron.core.dist_checkpointing.serialization:load",
        load,
        parameters=("sharded_state_dict", "checkpoint_dir"),
    ),
)


def _other_owner(requested: frozenset[str], folder: Path) -> str | None:
    """The message for a checkpoint in ``folder`` with another optimizer's state. None if neither of the two is Lion."""
    try:
        found = formats.moments({}, str(folder))
    except (Exception, CheckpointException):  # the first error says more
        return None
    running, writer = OWNERS.get(requested), OWNERS.get(found)
    if running == writer or "lion" not in (running, writer) or None in (running, writer):
        return None
    return (
        f"the optimizer state in {folder} was written by {writer}, and this run's optimizer is {running}. To continue "
        "with only the weights, load them without the optimizer's state. Nothing was changed"
    )


def _keys(request: Any) -> Iterator[str]:
    """The checkpoint keys of all tensors in ``request``."""
    if isinstance(request, dict):
        request = request.values()
    elif not isinstance(request, list | tuple):
        yield from (key for key in (getattr(request, "key", None),) if isinstance(key, str))
        return
    for value in request:
        yield from _keys(value)
