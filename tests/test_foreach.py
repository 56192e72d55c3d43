"""The foreach kernel on every storage: bits of the reference, few operations however many tensors, bounded memory."""

import collections
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_lion.kernels import foreach
from megatron_lion.kernels.foreach import lion_update_foreach_
from tests.kernel_calls import run
from tests.test_kernels import BF16, FP16, FP32, FP64, LANGUAGE, compare, problem, with_special_values
from tests.test_packed_kernels import packed

INT8 = torch.int8


@pytest.mark.parametrize(
    "dtypes",
    [*itertools.product([FP32, BF16], repeat=3), (FP16,) * 3, (FP32, FP16, FP64), (FP64, FP32, BF16)],
)
def test_each_mix_of_dtypes_has_the_bits_of_the_reference(dtypes, monkeypatch):
    monkeypatch.setattr(foreach, "MAX_NUMEL_CPU", 1100)  # both tensors that are cut and chunks of several
    lists = with_special_values(problem([1, 0, 4099, 31, 1025], FP32))
    for tensors in lists:
        tensors.append(tensors[-1][:1000].clone().view(40, 25).t())
    lists = [[t.to(dtype) for t in tensors] for tensors, dtype in zip(lists, dtypes, strict=True)]
    compare(lion_update_foreach_, lists, steps=2, grad_scale=0.37, **LANGUAGE)


class Operations(TorchDispatchMode):
    """Counts operations that are not views, and the most bytes at once in tensors made meanwhile."""

    def __init__(self):
        super().__init__()
        self.count = self.current = self.peak = 0
        self.holders = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {address(tensor) for tensor in tree_iter((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        for tensor in filter(torch.is_tensor, tree_iter(result)):
            if address(tensor) in self.holders or address(tensor) not in given:  # not of the caller
                self.hold(address(tensor), tensor)
        return result

    def hold(self, storage, tensor):
        size = tensor.untyped_storage().nbytes()
        self.current += size if self.holders[storage] == 0 else 0
        self.peak = max(self.peak, self.current)
        self.holders[storage] += 1
        weakref.finalize(tensor, self.release, storage, size)

    def release(self, storage, size):
        self.holders[storage] -= 1
        if self.holders[storage] == 0:
            del self.holders[storage]
            self.current -= size


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def measured(call, **hyper):
    with Operations() as operations:
        run(lion_update_foreach_, **call, **LANGUAGE, **hyper)
    assert operations.current == 0, "a temporary outlives the step"
    return operations


# Storage, and the temporary bytes per element of a chunk that the docstring and docs/gpu.md name.
BYTES = {
    (FP32, FP32, FP32): 12,
    (FP32, BF16, FP32): 12,
    (FP32, FP32, BF16): 16,
    (BF16, BF16, BF16): 20,
    ("remainder", FP32, FP32): 26,
    ("remainder", BF16, INT8): 30,
}


@pytest.mark.parametrize(("mix", "per_element"), BYTES.items(), ids=str)
def test_temporary_memory_is_bounded_by_the_chunk_not_by_the_tensors(mix, per_element, monkeypatch):
    monkeypatch.setattr(foreach, "MAX_NUMEL_CPU", 1 << 14)
    call = packed([[t.view(-1, 64) for t in tensors] for tensors in problem([1 << 17, 64, 4096], FP32)], *mix)
    peak = measured(call, grad_scale=0.5).peak / (1 << 14)
    assert peak <= per_element


@pytest.mark.parametrize("mix", BYTES, ids=str)
def test_the_number_of_operations_does_not_grow_with_the_number_of_tensors(mix):
    def count(tensors):
        return measured(packed(problem([96] * tensors, FP32), *mix), grad_scale=0.5).count

    assert count(4) == count(40)
