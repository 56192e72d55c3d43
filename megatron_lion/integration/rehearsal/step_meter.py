"""What a step keeps in memory for its backward pass and what it sends, counted while it runs."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


# torch's collectives: a name, the position of the tensors, and the part of their bytes that a rank sends in a ring.
COLLECTIVES: dict[str, tuple[str, int, Callable[[int], float]]] = {
    "allreduce_": ("all-reduce", 0, lambda ranks: 2 * _share(ranks)),
    "allreduce_coalesced_": ("all-reduce", 0, lambda ranks: 2 * _share(ranks)),
    "_allgather_base_": ("all-gather", 0, _share),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, _share),
    "allgather_": ("all-gather", 1, lambda ranks: ranks - 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1, _share),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, _share),
    "alltoall_base_": ("all-to-all", 1, _share),
    "alltoall_": ("all-to-all", 1, _share),
    "broadcast_": ("broadcast", 0, _share),
    "send": ("send", 0, lambda _: 1.0),
}


class Messages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is sent to other ranks while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._messages: Counter[tuple[str, str, int]] = Counter()
        self._bytes: Counter[tuple[str, str, int]] = Counter()

    def clear(self) -> None:
        """Forget what was counted."""
        self._messages.clear()
        self._bytes.clear()

    def counted(self) -> list[dict[str, Any]]:
        """Messages and bytes since the last ``clear``, by group and collective."""
        return [
            {"group": group, "collective": collective, "ranks": ranks, "messages": count, "bytes": self._bytes[key]}
            for key, count in self._messages.items()
            for group, collective, ranks in (key,)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._schema.name.partition("::")[2]) in COLLECTIVES:
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = dist.ProcessGroup.unbox(next(value for value in args if isinstance(value, torch.ScriptObject)))
        collective, position, part = COLLECTIVES[name]
        if group.size() > 1:
            key = (_name(group), collective, group.size())
            tensors = args[position] if isinstance(args[position], list) else [args[position]]
            self._messages[key] += len(tensors)
            self._bytes[key] += round(part(group.size()) * sum(tensor.nbytes for tensor in tensors))


def _name(group: Any) -> str:
    """Megatron's description of ``group``, such as TENSOR_MODEL_PARALLEL_GROUP, in words."""
    words: str = group.group_desc
    return words.replace("_GROUP", "").replace("_", " ").lower() if "_GROUP" in words else "all ranks"


class Activations:
    """Counts the memory that autograd keeps for backward passes. Each storage counts once."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        """``parameters`` and what shares their memory do not count."""
        self._ignored = {param.untyped_storage().data_ptr() for param in parameters}
        self._users: Counter[int] = Counter()
        self._now = 0
        self.peak = 0
        """bytes, the most at a time"""

    def start(self) -> None:
        """Count from now on, in this thread, for good."""
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(self, tensor), _Kept.tensor).__enter__()

    def keep(self, storage: torch.UntypedStorage) -> None:
        """A tensor in ``storage`` is kept."""
        where = storage.data_ptr()
        if where not in self._ignored:
            self._now += storage.nbytes() * (self._users[where] == 0)
            self._users[where] += 1
            self.peak = max(self.peak, self._now)

    def release(self, storage: torch.UntypedStorage) -> None:
        """A tensor in ``storage`` is not kept any more."""
        where = storage.data_ptr()
        if where not in self._ignored:
            self._users[where] -= 1
            self._now -= storage.nbytes() * (self._users[where] == 0)


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, counter: Activations, tensor: torch.Tensor) -> None:
        self._counter, self._tensor, self._storage = counter, tensor, tensor.untyped_storage()
        counter.keep(self._storage)

    def tensor(self) -> torch.Tensor:
        """It."""
        return self._tensor

    def __del__(self) -> None:
        self._counter.release(self._storage)
