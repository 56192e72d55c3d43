"""Count the bytes that a step reads and writes, and pass over the same bytes in a stream.

A step that is one pass is described by its streams: each tensor, and whether the pass reads it, writes it or both. A
step made of torch's own operations is run once under :class:`Counted`, which adds up what each operation reads and
writes. Bytes that fit in a cache are counted too, so such a step can look faster than its bytes allow.
"""

import ctypes
import functools
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_lion.kernels import compiler

READ, WRITE, UPDATE = 1, 2, 3

# Operations that overwrite their first argument without reading it.
OVERWRITES = ("copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_")
# Operations that use only the shape of their argument. "empty" ones write nothing either.
FACTORIES = ("empty_like", "new_empty", "zeros_like", "new_zeros", "ones_like", "full_like")
# torch's fused steps declare gradients as written, which is true only with a gradient scaler.
FUSED_READ_ONLY = {"_fused_adamw_": ("grads",), "_fused_adam_": ("grads",), "_fused_sgd_": ("grads",)}


@dataclass(frozen=True)
class Stream:
    """Tensors that one pass reads (READ), writes (WRITE) or reads and writes in place (UPDATE)."""

    tensors: Sequence[Tensor]
    mode: int

    @property
    def bytes(self) -> int:
        """Bytes that the pass moves for these tensors."""
        return (2 if self.mode == UPDATE else 1) * sum(t.numel() * t.element_size() for t in self.tensors)


def streams_of(optimizer: torch.optim.Optimizer, untouched: Sequence[str] = ()) -> list[Stream]:
    """Streams of a one-pass step of ``optimizer``, stepped once: gradients in, parameters and state in and out.

    A 16-bit parameter with an fp32 master is only written. State named in ``untouched`` is not moved.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    name = "decoupled_grad" if getattr(optimizer, "use_decoupled_grad", False) else "grad"
    state: dict[str, list[Tensor]] = {}
    for param in params:
        for key, value in _tensors_of(optimizer.state[param]):
            if value.dim() and key not in untouched:
                state.setdefault(key, []).append(value)
    has_masters = any(tensor.dtype == torch.float32 for tensor in state.get("master_param", ()))
    made = [
        Stream([getattr(param, name) for param in params], READ),
        Stream([param.detach() for param in params], WRITE if has_masters else UPDATE),
        *(Stream(tensors, UPDATE) for tensors in state.values()),
    ]
    copies = list(getattr(optimizer, "model_copies", {}).values())
    return [*made, Stream(copies, WRITE)] if copies else made


def _tensors_of(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one parameter's state, including those inside an object (FlashLion's int8 momentum)."""
    for key, value in state.items():
        if torch.is_tensor(value):
            yield key, value
        else:
            inner = getattr(value, "__dict__", {})
            yield from ((f"{key}.{name}", tensor) for name, tensor in inner.items() if torch.is_tensor(tensor))


class Counted(TorchDispatchMode):
    """Adds up, in ``bytes``, what torch's operations read and write while it is entered. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        result = func(*args, **kwargs)
        if func.is_view or func.namespace == "c10d":  # what ranks exchange is not the step's own traffic
            return result
        storages = set()
        for number, argument in enumerate(func._schema.arguments):
            size = _size(given.get(argument.name), storages)
            written = argument.alias_info is not None and argument.alias_info.is_write
            written = written and argument.name not in FUSED_READ_ONLY.get(name, ())
            read = name not in FACTORIES and not (name in OVERWRITES and number == 0)
            self.bytes += size * (read + written)
        if not name.startswith(("empty", "new_empty")):
            self.bytes += _size([t for t in tree_iter(result) if _key(t) not in storages], set())
        return result


def _key(value: Any) -> Any:
    return value.untyped_storage().data_ptr() if torch.is_tensor(value) and value.dim() else None


def _size(value: Any, storages: set[Any]) -> int:
    tensors = [leaf for leaf in tree_iter(value) if torch.is_tensor(leaf) and leaf.dim()]
    storages.update(_key(tensor) for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def counted(step: Callable[[], object]) -> int:
    """Bytes that one call of ``step`` moves, by its operations; call it once before, so that its state is there."""
    with Counted() as mode:
        step()
    return mode.bytes


STREAM = r"""
#include <cstdint>

// Pass once over the arrays of each of `tensors` tensors: read (their sum is returned), write `fill`, or add `zero`.
// Arrays with as many elements as the tensor go together, element by element, and unless AHEAD is 0 they are fetched
// into the cache so many elements before they are used; shorter ones follow each chunk.
extern "C" uint64_t stream(int64_t tensors, void *const *pointers, const int64_t *counts, uint32_t zero,
                           uint32_t fill, int64_t threads) {
    const int64_t CHUNK = 262144, PIECE = 64;
    int64_t chunks = 0, next = 0;
    uint64_t sum = 0;
    for (int64_t t = 0; t < tensors; ++t) chunks += (counts[t * STREAMS] + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    for (int64_t t = 0, before = 0;;) {
        int64_t mine;
#pragma omp atomic capture
        mine = next++;
        if (mine >= chunks) break;
        for (; mine >= before + (counts[t * STREAMS] + CHUNK - 1) / CHUNK; ++t)
            before += (counts[t * STREAMS] + CHUNK - 1) / CHUNK;
        const int64_t numel = counts[t * STREAMS], from = (mine - before) * CHUNK;
        const int64_t to = from + CHUNK < numel ? from + CHUNK : numel;
        uint32_t part = 0;
POINTERS
        for (int64_t piece = from; piece < to; piece += PIECE) {
            const int64_t end = piece + PIECE < to ? piece + PIECE : to;
            if (AHEAD && end + AHEAD <= to) {
FETCHED
            }
            for (int64_t i = piece; i < end; ++i) {
TOGETHER
            }
        }
SHORTER
        sum += part;
    }
    return sum;
}
"""
INTEGERS = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
FETCH = "for (int64_t i = 0; i < PIECE; i += 64 / {size}) __builtin_prefetch(a{number} + piece + AHEAD + i);"
FILL = 0x3C3C3C3C  # a number near 0.01 in fp32 and bf16: a later step of these tensors must not meet denormals
STATEMENTS = {READ: "part += a{0}[{1}];", WRITE: "a{0}[{1}] = fill;", UPDATE: "a{0}[{1}] += zero;"}


def streaming_pass(streams: Sequence[Stream], ahead: int = 0) -> Callable[[], object]:
    """A pass that moves what ``streams`` say, with one addition for each element; what is only written becomes FILL.

    A CPU's own prefetchers are left alone, or helped by fetching each stream ``ahead`` elements before it is used. On a
    GPU it is a copy of as many bytes, half of them read and half written.
    """
    if any(tensor.is_cuda for stream in streams for tensor in stream.tensors):
        return functools.partial(_copy_on_gpu, sum(stream.bytes for stream in streams) // 2)
    if len({len(stream.tensors) for stream in streams}) != 1:
        raise ValueError(f"streams of one pass have as many tensors each, not {[len(s.tensors) for s in streams]}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stream.cpp"
        source.write_text(_source(streams))
        library = compiler.load(source, f"STREAMS={len(streams)}", f"AHEAD={ahead}")
    rows = list(zip(*(stream.tensors for stream in streams), strict=True))
    pointers = array("Q", [tensor.data_ptr() for row in rows for tensor in row])
    counts = array("q", [tensor.numel() for row in rows for tensor in row])

    def step() -> object:
        addresses = (ctypes.c_void_p(values.buffer_info()[0]) for values in (pointers, counts))
        threads = ctypes.c_int64(torch.get_num_threads())
        library.stream(ctypes.c_int64(len(rows)), *addresses, ctypes.c_uint32(0), ctypes.c_uint32(FILL), threads)
        return rows  # keeps the tensors

    return step


def _copy_on_gpu(size: int) -> None:
    half = torch.empty(size, dtype=torch.uint8, device="cuda")  # from the allocator's cache after the first time
    torch.empty_like(half).copy_(half)


def _source(streams: Sequence[Stream]) -> str:
    """The pass over these streams in C++. Their first has the tensors' own numbers of elements."""
    pointers, fetched, together, shorter = [], [], [], []
    for number, stream in enumerate(streams):
        kind = INTEGERS[stream.tensors[0].element_size()]
        pointers.append(f"{kind} *__restrict a{number} = ({kind} *)pointers[t * STREAMS + {number}];")
        statement = STATEMENTS[stream.mode]
        if all(a.numel() == b.numel() for a, b in zip(stream.tensors, streams[0].tensors, strict=True)):
            together.append(statement.format(number, "i"))
            fetched.append(FETCH.format(number=number, size=stream.tensors[0].element_size()))
        else:
            count = f"counts[t * STREAMS + {number}]"
            bounds = f"int64_t i = {count} * from / numel; i < {count} * to / numel; ++i"
            shorter.append(f"for ({bounds}) {statement.format(number, 'i')}")
    text = STREAM
    for place, lines in (("POINTERS", pointers), ("FETCHED", fetched), ("TOGETHER", together), ("SHORTER", shorter)):
        text = text.replace(place, "\n".join(lines))
    return text
