"""Blocks of packed gradients against fp64, and every kernel against the reference, bit for bit."""

import pytest
import torch

from megatron_lion.exchange import blocks
from megatron_lion.exchange.blocks import BLOCK, CODES, Residual
from megatron_lion.exchange.pieces import PieceFormat, sum_blocks, sum_exact_, write_blocks_, write_exact_

SIZES = [0, 1, 63, 64, 65, 319, 320, 1000, 4096]
FEEDBACKS = ["int8", "bf16", None]
BITS = {"int8": 8.25, "int4": 4.25, "ternary": 1.85}
EVERY_CODE = pytest.mark.parametrize("code", CODES)


def gradient(numel, *, seed=0, dtype=torch.float32):
    """Blocks of very different sizes, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.empty(-(-numel // BLOCK)).uniform_(-12, 3, generator=generator)
    values = torch.randn(numel, generator=generator) * scale.repeat_interleave(BLOCK)[:numel]
    return torch.where(torch.rand(numel, generator=generator) < 0.1, 0.0, values).to(dtype)


def in_blocks(values):
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)


@EVERY_CODE
@pytest.mark.parametrize("numel", SIZES)
def test_packing_is_exact(code, numel):
    codes, scales = blocks.quantize(gradient(numel), code)
    packed = blocks.pack(codes, code, numel)
    assert packed.numel() == blocks.packed_bytes(code, numel)
    assert torch.equal(blocks.unpack(packed, code, numel), codes)
    assert scales.numel() == blocks.count_blocks(numel)


@EVERY_CODE
def test_bits_per_element(code):
    numel = 320 * 64
    assert 8 * PieceFormat(code, numel).nbytes / numel == pytest.approx(BITS[code])


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_an_element_is_off_by_half_a_level_at_most(code):
    values = gradient(10_000)
    codes, scales = blocks.quantize(values, code)
    off = in_blocks(values.double() - blocks.dequantize(codes, scales, values.numel()).double()).abs()
    largest = in_blocks(values).double().abs().amax(1, keepdim=True)
    # Half a level, or what a scale that bf16 rounded down leaves of the largest element.
    assert (off <= largest * (0.5 / blocks.LEVELS[code]) * (1 + 2.0**-7) + largest * 2.0**-8).all()


# docs/exchange-theory.md
CONTRACTIONS = {"int8": 0.032, "int4": 0.58, "ternary": 0.965}


def unfavorable_blocks():
    """Heavy tails, and for ternary blocks those with the largest residual: n equal elements above the threshold, one
    outlier, and the rest just below the threshold."""
    generator = torch.Generator().manual_seed(0)
    tails = torch.randn(2000, BLOCK, generator=generator).pow(3) * torch.rand(2000, 1, generator=generator)
    worst = []
    for kept in range(1, BLOCK):
        for outlier in torch.linspace(28.5, 92.4 - kept, 60).tolist():
            rest = (BLOCK / 0.7 - outlier - (kept - 1)) / (BLOCK - kept)
            worst.append([outlier] + [1.001] * (kept - 1) + [min(max(rest, 0.0), 0.999)] * (BLOCK - kept))
    return torch.cat([tails, torch.tensor(worst)])


@EVERY_CODE
def test_a_residual_is_smaller_than_its_block(code):
    """What the bound of the theory needs, and what it has for the residual's own rounding."""
    values = unfavorable_blocks()
    codes, scales = blocks.quantize(values.view(-1), code)
    left = values.double() - blocks.dequantize(codes, scales, values.numel()).double().view_as(values)
    ratio = float((left.norm(dim=1) / values.double().norm(dim=1)).max())
    assert {"ternary": 0.96}.get(code, 0.0) < ratio <= CONTRACTIONS[code]
    for feedback, lost in (("int8", 0.032), ("bf16", 0.004)):
        residual = Residual.zeros(feedback, left.numel(), "cpu")
        residual.store_(left.float().view(-1))
        error = left - residual.values(left.numel()).double().view_as(left)
        assert bool((error.norm(dim=1) <= lost * left.norm(dim=1)).all())


def test_ternary_blocks_keep_the_elements_above_the_threshold():
    values = gradient(10_000)
    codes, scales = blocks.quantize(values, "ternary")
    exact = in_blocks(values).double()
    kept = exact.abs() > 0.7 * exact.abs().mean(1, keepdim=True)
    mean = (exact.abs() * kept).sum(1) / kept.sum(1).clamp(min=1)
    assert ((codes == torch.sign(exact) * kept).double().mean()) > 0.9999  # fp32 may round at the threshold
    torch.testing.assert_close(scales.double(), mean, rtol=2.0**-8, atol=1e-30)


@EVERY_CODE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_is_nan_and_others_are_not(code, value):
    values = gradient(3 * BLOCK)
    values[70] = value
    sent = blocks.dequantize(*blocks.quantize(values, code), values.numel())
    assert sent[BLOCK : 2 * BLOCK].isnan().all()
    assert sent[:BLOCK].isfinite().all() and sent[2 * BLOCK :].isfinite().all()


@EVERY_CODE
def test_zeros_and_tiny_numbers(code):
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-38]).repeat(26)[: 2 * BLOCK]
    codes, scales = blocks.quantize(values, code)
    assert scales.isfinite().all()
    assert torch.equal(blocks.dequantize(*blocks.quantize(torch.zeros(BLOCK), code), BLOCK), torch.zeros(BLOCK))
    assert blocks.dequantize(codes, scales, len(values)).abs().max() <= 1.1e-38


@EVERY_CODE
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_sent_and_what_is_kept_is_the_gradient(code, feedback, dtype):
    """Over 20 steps, in fp64: to fp32 rounding before the residual is stored, and to its rounding after."""
    numel = 1000
    form = PieceFormat(code, numel, dtype)
    message = torch.zeros(form.nbytes, dtype=torch.uint8)
    residual = None if feedback is None else Residual.zeros(feedback, numel, "cpu")
    for step in range(20):
        values = gradient(numel, seed=step, dtype=dtype)
        before = 0.0 if residual is None else residual.values(numel).double()
        write_blocks_(message, values, residual, form)
        parts = form.sections(message)
        sent = blocks.dequantize(blocks.unpack(parts.codes, code, numel), parts.scales, numel).double()
        wanted = values.double() + before
        if residual is None:
            continue
        rest = wanted - sent
        largest = in_blocks(rest).abs().amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)[:numel]
        stored = largest * 2.0**-7 if feedback == "int8" else rest.abs() * 2.0**-8
        bound = stored + wanted.abs() * 2.0**-22
        assert ((residual.values(numel).double() - rest).abs() <= bound).all()


@EVERY_CODE
def test_error_feedback_loses_nothing_over_many_steps(code):
    """Of a constant gradient, k steps send k times as much up to one residual; without feedback they do not."""
    numel, steps = 640, 200
    constant = gradient(numel)
    form = PieceFormat(code, numel)
    message = torch.zeros(form.nbytes, dtype=torch.uint8)
    off = {}
    for feedback in ("bf16", None):
        residual = None if feedback is None else Residual.zeros(feedback, numel, "cpu")
        total = torch.zeros(numel, dtype=torch.float64)
        for _ in range(steps):
            write_blocks_(message, constant, residual, form)
            parts = form.sections(message)
            total += blocks.dequantize(blocks.unpack(parts.codes, code, numel), parts.scales, numel)
        off[feedback] = ((total / steps - constant).norm() / constant.norm()).item()
    assert off["bf16"] < 0.03 and off["bf16"] < off[None] / 2 + 2e-3


@EVERY_CODE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_owner_has_the_sum(code, dtype, rank):
    """Exact elements as they were, the others as they were sent; against fp64."""
    numel, ranks = 500, 4
    form = PieceFormat(code, numel, dtype, exact=((0, 10), (100, 131), (490, 500)))
    others = [gradient(numel, seed=other, dtype=dtype) for other in range(ranks - 1)]
    own = gradient(numel, seed=9, dtype=dtype)
    wanted = own.double()
    messages = torch.zeros(ranks - 1, form.nbytes, dtype=torch.uint8)
    for message, values in zip(messages, others, strict=True):
        exact = values.clone()
        write_exact_(message, values, form)
        assert not values[100:131].any()
        write_blocks_(message, values, None, form)
        sent = blocks.dequantize(*blocks.quantize(values.float(), code), numel).double()
        for start, stop in form.exact:
            sent[start:stop] = exact[start:stop].double()
        wanted = wanted + sent
    total = sum_blocks(own, messages, rank, form)
    sum_exact_(total, own, messages, rank, form)
    scale = sum(values.abs().max() for values in [own, *others]).double()
    assert ((total.double() - wanted).abs() <= scale * 2.0**-22).all()


@pytest.mark.parametrize("feedback", ["int8", "bf16"])
def test_a_residual_follows_the_loss_scale(feedback):
    residual = Residual.zeros(feedback, 1000, "cpu")
    residual.store_(gradient(1000))
    before = residual.values(1000)
    residual.scale_(0.5)
    assert torch.equal(residual.values(1000), before * 0.5)
    residual.zero_()
    assert not residual.values(1000).any()


def test_an_unknown_code_is_refused():
    with pytest.raises(ValueError, match="code 'int5' is unknown: use one of int8, int4, ternary"):
        PieceFormat("int5", 64)


def test_tensors_of_another_format_are_refused():
    form = PieceFormat("int4", 640)
    with pytest.raises(ValueError, match="messages must be contiguous"):
        form.check(torch.zeros(640), torch.zeros(2, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="the gradient must be contiguous"):
        form.check(torch.zeros(640, dtype=torch.bfloat16), torch.zeros(2, form.nbytes, dtype=torch.uint8))
