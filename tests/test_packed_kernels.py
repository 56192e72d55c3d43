"""The kernels that take packed state have the reference's bits: remainders of master weights, momentum in 8 bits."""

import itertools
import math
import platform

import pytest
import torch

from megatron_lion.kernels import compiler, foreach
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.precision import BLOCK, BlockLayout, quantize, split_master
from tests.kernel_calls import reference, run
from tests.test_kernels import LANGUAGE, assert_same_bits, problem, with_special_values

FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
KERNELS = {"fused": lion_update_fused_, "foreach": lion_update_foreach_}
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def packed(lists, param, grad, momentum, blocks=None, copies=False):
    """A call's tensors for fp32 ``lists``: parameters as remainders or in a dtype, momentum in int8 or a dtype."""
    params, grads, exp_avgs = lists
    blocks = blocks or [BlockLayout.of_whole(tensor) for tensor in params]
    call = {"masters": params, "grads": [tensor.to(grad) for tensor in grads], "exp_avgs": exp_avgs}
    if copies:
        call["model_copies"] = [torch.zeros(tensor.shape, dtype=BF16, device=tensor.device) for tensor in params]
    if param == "remainder":
        split = [split_master(tensor) for tensor in params]
        call |= {"masters": [high for high, _ in split], "remainders": [low for _, low in split]}
    else:
        call["masters"] = [tensor.to(param) for tensor in params]
    if momentum == INT8:
        codes = [quantize(tensor, layout) for tensor, layout in zip(exp_avgs, blocks, strict=True)]
        call |= {"exp_avgs": [code for code, _ in codes], "scales": [scale for _, scale in codes], "blocks": blocks}
    else:
        call["exp_avgs"] = [tensor.to(momentum) for tensor in exp_avgs]
    return call


def compare_packed(kernel, call, steps=2, **hyper):
    """Run ``kernel`` and the reference from the same start and compare every bit of all that they were given."""
    hyper = {**LANGUAGE, **hyper}
    expected = {
        name: [entry.clone() if torch.is_tensor(entry) else entry for entry in role] for name, role in call.items()
    }
    for _ in range(steps):
        run(kernel, **call, **hyper)
        reference(**expected, **hyper)
        for name in call.keys() - {"blocks"}:
            assert_same_bits(call[name], expected[name])


MIXES = [
    (param, grad, momentum)
    for param, grad, momentum in itertools.product(["remainder", FP32, BF16], [FP32, BF16], [FP32, BF16, INT8])
    if param == "remainder" or momentum == INT8
]


@EVERY_KERNEL
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("copies", [False, True])
def test_each_mix_of_storage_has_the_bits_of_the_reference(kernel, mix, copies):
    lists = with_special_values(problem([1, 0, 5003, 31, 32, 33, 4099], FP32))
    compare_packed(kernel, packed(lists, *mix, copies=copies), grad_scale=0.37)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its instruction sets are those of x86")
@pytest.mark.parametrize("march", ["haswell", "sandybridge", "x86-64"])  # with AVX2, AVX, neither
def test_code_for_a_cpu_with_shorter_vectors_has_the_bits_of_the_reference(march, monkeypatch):
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, f"-march={march}"))
    compiler._load_once.cache_clear()
    try:
        lists = with_special_values(problem([1, 0, 5003, 31, 32, 33, 4099], FP32))
        for *mix, copies in itertools.product(
            ["remainder", FP32, BF16], [FP32, BF16], [FP32, BF16, INT8], [False, True]
        ):
            for row in (50, 10_000):
                call = packed(lists, *mix, [BlockLayout(0, row)] * len(lists[0]), copies=copies)
                compare_packed(lion_update_fused_, call, grad_scale=0.37)
    finally:
        compiler._load_once.cache_clear()


ROWS = [1, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 50, 63, 64, 65, 100, 1000, 1024]


@EVERY_KERNEL
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_any_length_have_the_bits_of_the_reference(kernel, row):
    compare_packed(
        kernel, packed([[t.view(-1, row) for t in ts] for ts in problem([37 * row], FP32)], FP32, FP32, INT8)
    )


@EVERY_KERNEL
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("mix", [("remainder", BF16), (FP32, FP32)], ids=str)
def test_shards_that_start_anywhere_in_a_row_have_the_bits_of_the_reference(kernel, row, mix):
    """Each with NaN, infinities and denormals at its end, in whole and in incomplete blocks."""
    starts = sorted({start % row for start in (0, 1, 7, 31, 32, 33, 63, 100, row - 1)})
    blocks = [BlockLayout(start, row) for start in starts]
    lists = with_special_values(problem([2300 + 97 * i for i in range(len(blocks))], FP32))
    compare_packed(kernel, packed(lists, *mix, INT8, blocks, copies=mix[0] == FP32), grad_scale=0.37)


@EVERY_KERNEL
@pytest.mark.parametrize("row", [4, 8, 20, 40, 100])
@pytest.mark.parametrize("param", ["remainder", FP32, BF16])
def test_a_row_that_is_not_finite_leaves_its_neighbors_as_they_are(kernel, row, param):
    """A vector of a short row reaches into the next ones."""
    lists = [[tensor.view(-1, row) for tensor in tensors] for tensors in problem([24 * row], FP32)]
    for tensors, value in zip(lists, (math.nan, math.inf, 3e38), strict=True):
        tensors[0][1::4] = value
    call = packed(lists, param, FP32, INT8, copies=param != BF16)
    compare_packed(kernel, call)
    assert all(call["masters"][0][first::4].isfinite().all() for first in (0, 2, 3))


@EVERY_KERNEL
@pytest.mark.parametrize("mix", [*itertools.product(["remainder", FP32], [BF16], [INT8, BF16]), (FP32, FP32, FP32)])
def test_nothing_is_written_outside_the_tensors(kernel, mix):
    """Slices of larger tensors, of every length up to two blocks and some more, that begin at any address."""
    lengths = [*range(1, 67), 255, 256, 257, 700]
    call = packed(problem(lengths, FP32), *mix, copies=mix[0] == FP32)
    wholes = []
    for name in call.keys() - {"blocks"}:
        for i, tensor in enumerate(call[name]):
            first = 1 + i % 16
            whole = torch.full((first + tensor.numel() + 40,), 77, dtype=tensor.dtype)
            call[name][i] = whole[first : first + tensor.numel()].copy_(tensor)
            wholes.append((whole, first, first + tensor.numel()))
    compare_packed(kernel, call)
    for whole, first, last in wholes:
        assert (whole[:first] == 77).all() and (whole[last:] == 77).all()


@EVERY_KERNEL
@pytest.mark.parametrize("row", [1, 33, 96, 1000, 50_257])
def test_pieces_that_begin_and_end_anywhere_have_the_bits_of_the_reference(kernel, row):
    """Also inside a block, where the piece's first or last block is a part of the parameter's."""
    generator = torch.Generator().manual_seed(row)
    starts = torch.randint(0, 4 * row, (12,), generator=generator).tolist()
    blocks = [BlockLayout(start, row) for start in [0, row - row % BLOCK, *starts]]
    numels = torch.randint(0, 2500, (len(blocks),), generator=generator).tolist()
    compare_packed(kernel, packed(problem(numels, FP32), "remainder", BF16, INT8, blocks))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("row", [768, 999])
def test_chunks_of_a_large_tensor_on_any_number_of_threads_have_the_bits_of_the_reference(threads, row):
    """Threads share a tensor at multiples of 262,144 elements, moved to where a block begins."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numel = 1_000_003
        call = packed(
            problem([numel, 5], FP32), "remainder", BF16, INT8, [BlockLayout(0, row), BlockLayout(row - row % 32, row)]
        )
        compare_packed(lion_update_fused_, call, steps=1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [1, 40, 1000])
@pytest.mark.parametrize("row", [1, 33, 96, 1000])
def test_foreach_cuts_large_tensors_where_blocks_begin(limit, row, monkeypatch):
    """Pieces that begin and end anywhere, together in chunks with whole tensors."""
    monkeypatch.setattr(foreach, "MAX_NUMEL_CPU", limit)
    blocks = [BlockLayout(start, row) for start in (0, row - row % BLOCK, 7, 3 * row + 40, 0, 32, 0)]
    call = packed(problem([900, 300, 200, 0, 8 * row, 96, 32], FP32), "remainder", BF16, INT8, blocks, copies=True)
    compare_packed(lion_update_foreach_, call, grad_scale=0.37)


@EVERY_KERNEL
def test_every_scale_and_code_is_read_as_the_reference_reads_it(kernel):
    """All bit patterns of a scale, denormals, infinities and NaN among them, each with 32 codes; the codes all 256."""
    scales = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    codes = (torch.arange(len(scales) * BLOCK) * 37 % 256 - 128).to(INT8)
    zeros = torch.zeros(len(codes))
    call = {"masters": [zeros], "grads": [zeros.to(BF16)], "exp_avgs": [codes], "scales": [scales]}
    compare_packed(kernel, {**call, "blocks": [BlockLayout(0, BLOCK)]}, steps=1, beta2=0.999)


@EVERY_KERNEL
def test_momentum_of_every_magnitude_is_quantized_as_the_reference_does(kernel):
    """Blocks around 2^-100 and around the largest fp32, and codes on both sides of every rounding tie."""
    exponents = torch.arange(-149, 128).repeat_interleave(4).double()
    largest = (2.0**exponents * torch.tensor([1.0, 1.00390625, 1.5, 1.9999999]).repeat(277)).clamp(max=3.4028234e38)
    generator = torch.Generator().manual_seed(5)
    halves = torch.randint(0, 254, (len(largest), BLOCK), generator=generator) / 2
    wiggle = 1 + torch.randint(-2, 3, halves.shape, generator=generator) * 2.0**-23
    grads = (largest[:, None] * (halves / 127) ** 2 * wiggle).float()
    grads[:, 0] = largest.float()
    grads[:, 1::2] *= -1
    call = packed([[torch.zeros_like(grads)], [grads], [torch.zeros_like(grads)]], FP32, FP32, INT8)
    compare_packed(kernel, call, steps=1, beta2=0.0)
    assert call["exp_avgs"][0].unique().numel() == 255


@EVERY_KERNEL
def test_every_class_of_master_is_rebuilt_and_split_as_the_reference_does(kernel):
    """All exponents and signs with the halves around each tie, kept by a step of learning rate 0, then moved."""
    halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    masters = (torch.arange(1 << 16)[:, None] * (1 << 16) + halves).flatten().to(torch.int32).view(FP32)
    for lr in (0.0, 1e-3):
        grads = torch.where(torch.arange(len(masters)) % 2 == 0, 1.0, -1.0)
        call = packed([[masters], [grads], [torch.zeros_like(masters)]], "remainder", FP32, BF16)
        compare_packed(kernel, call, steps=1, lr=lr)


@EVERY_KERNEL
def test_tensors_that_are_not_contiguous_are_updated_too(kernel):
    params, grads, exp_avgs = ([t.view(20, 30) for t in ts] for ts in problem([600, 600], FP32))
    call = packed([params, [grads[0].t().contiguous().t(), grads[1]], exp_avgs], "remainder", FP32, INT8)
    assert not call["grads"][0].is_contiguous()
    compare_packed(kernel, call)
