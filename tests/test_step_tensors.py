"""``StepTensors`` refuses tensors that do not fit together, before any kernel runs."""

import pytest
import torch

from megatron_lion.precision import BlockLayout
from megatron_lion.step import StepKind, StepTensors
from tests.test_kernels import problem
from tests.test_packed_kernels import BF16, FP32, INT8, packed

CPU = torch.device("cpu")


def call(**change):
    """Two parameters with remainders, int8 momentum and model copies, as lists by name."""
    layouts = [BlockLayout(0, 64), BlockLayout(64, 64)]
    return packed(problem([7, 40], FP32), "remainder", FP32, INT8, layouts, copies=True) | change


def zeros(*numels, dtype=FP32):
    return [torch.zeros(numel, dtype=dtype) for numel in numels]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grads": zeros(7)}, r"one entry per parameter.*'grads': 1"),
        ({"blocks": [BlockLayout(0, 64)]}, r"one entry per parameter.*'blocks': 1"),
        ({"grads": zeros(7, 41)}, r"grads\[1\] has 41 elements, but masters\[1\] has 40"),
        ({"exp_avgs": zeros(8, 40, dtype=INT8)}, r"exp_avgs\[0\] has 8 elements, but masters\[0\] has 7"),
        ({"model_copies": zeros(7, 1, dtype=BF16)}, r"model_copies\[1\] has 1 elements"),
        ({"remainders": zeros(0, 40, dtype=torch.int16)}, r"remainders\[0\] has 0 elements"),
        ({"scales": zeros(2, 2, dtype=BF16)}, r"scales\[0\] has 2 entries, but 7 elements with BlockLayout.* 1 blocks"),
        ({"blocks": [BlockLayout(0, 7)] * 2}, r"scales\[1\] has 2 entries, but 40 elements .*row_length=7.* 6 blocks"),
        ({"grads": [torch.zeros(7), torch.zeros(40).double()]}, "grads must have one dtype, got .*float32, .*float64"),
        ({"masters": zeros(7, 40)}, "masters must be torch.bfloat16 here, got torch.float32"),
        ({"remainders": zeros(7, 40)}, "remainders must be torch.int16 here, got torch.float32"),
        ({"exp_avgs": zeros(7, 40)}, "exp_avgs must be torch.int8 here, got torch.float32"),
        ({"scales": zeros(1, 2)}, "scales must be torch.bfloat16 here, got torch.float32"),
        ({"scales": None}, "exp_avgs must be floating-point, got torch.int8; int8 momenta need scales"),
        ({"grads": zeros(7, 40, dtype=torch.int32)}, "grads must be floating-point, got torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_index(change, said):
    StepTensors(**call())
    with pytest.raises(ValueError, match=said):
        StepTensors(**call(**change))


@pytest.mark.parametrize("role", ["masters", "grads", "exp_avgs", "model_copies", "remainders", "scales"])
def test_a_tensor_on_another_device_is_refused(role):
    """A kernel would read its address on the wrong device."""
    lists = call()
    lists[role] = [lists[role][0], lists[role][1].to("meta")]
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        StepTensors(**lists)


def test_the_kind_names_device_and_dtypes():
    assert StepTensors(**call()).kind == StepKind(CPU, BF16, FP32, INT8, BF16, torch.int16, BF16)
    assert StepTensors([], [], []).kind is None


def test_selected_tensors_keep_their_lists_and_layouts():
    lists = call()
    chosen = StepTensors(**lists).select([False, True])
    assert chosen.blocks == [BlockLayout(64, 64)]
    for name, tensors in chosen.roles().items():
        assert len(tensors) == 1
        assert tensors[0] is lists[name][1]
    assert StepTensors(*problem([3, 0], FP32)).select([True, False]).roles().keys() == {"masters", "grads", "exp_avgs"}


def test_entries_are_tuples_of_one_parameter():
    lists = call(remainders=None, masters=zeros(7, 40), model_copies=None)
    for index, entry in enumerate(StepTensors(**lists).entries()):
        assert entry[3:5] == (None, None)
        names = ("masters", "grads", "exp_avgs", "scales", "blocks")
        assert all(value is lists[name][index] for name, value in zip(names, entry[:3] + entry[5:], strict=True))


@pytest.mark.parametrize("row_length", [1, 31, 32, 33, 100])
def test_blocks_are_counted_as_one_by_one(row_length):
    for start in (0, row_length - row_length % 32, 3, 5 * row_length + 7):
        for numel in (0, 1, 31, 32, 33, 64, 250):
            elements = range(start, start + numel)
            blocks = {(element // row_length, element % row_length // 32) for element in elements}
            assert BlockLayout(start, row_length).count(numel) == len(blocks)


def test_a_wrapper_without_memory_is_refused():
    """A kernel would read at its address, which is not that of its data."""
    from torch.testing._internal.two_tensor import TwoTensor

    wrapped = TwoTensor(torch.zeros(7), torch.zeros(7))
    with pytest.raises(ValueError, match="tensors of type TwoTensor are not supported"):
        StepTensors(masters=zeros(7), grads=[wrapped], exp_avgs=zeros(7))
