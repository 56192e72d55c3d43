"""The sums: right against exact summation, the same however the elements are split, and honest about NaN and inf."""

import math

import pytest
import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.stats import GradientSums, MeanGradient, pack, squared_norm, sums, unpack


def tensors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A gradient whose elements span ten orders of magnitude, and a parameter."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (10 * torch.rand(shape, generator=generator) - 8)
    grad, param = (torch.randn(shape, generator=generator) for _ in range(2))
    return (grad * scale).to(dtype), param.to(dtype)


def integers(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    grad, param = (torch.randint(-99, 100, shape, generator=generator).float() for _ in range(2))
    return grad, param


def close(a: GradientSums, b: GradientSums, rel: float = 1e-14) -> bool:
    return all(math.isclose(getattr(a, name), getattr(b, name), rel_tol=rel) for name in GradientSums.__annotations__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sums_equal_exact_summation_to_1e_12(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "CHUNK", 1000)
    grad, param = tensors(321, 77, dtype=dtype)
    measured = GradientSums.from_tensors(grad, param, 0.25)
    g, theta = grad.double().flatten().tolist(), param.double().flatten().tolist()
    assert measured.l1 == pytest.approx(math.fsum(map(abs, g)), rel=1e-12)
    assert measured.l2_squared == pytest.approx(math.fsum(x * x for x in g), rel=1e-12)
    inner = [0.25 * x * y for x, y in zip(g, theta, strict=True)]
    assert abs(measured.weighted_inner - math.fsum(inner)) <= 1e-12 * math.fsum(map(abs, inner))
    assert measured.linf_param == max(map(abs, theta))
    assert (measured.d, measured.d_padding, measured.nonfinite) == (321 * 77, 0, 0)
    assert float(squared_norm([grad, None])) == pytest.approx(measured.l2_squared, rel=1e-12)


def test_any_split_merges_to_the_whole() -> None:
    grad, param = tensors(1000)
    whole = GradientSums.from_tensors(grad, param, 0.1)
    for at in (0, 1, 333, 1000):
        parts = [GradientSums.from_tensors(grad[s], param[s], 0.1) for s in (slice(0, at), slice(at, None))]
        assert close(parts[0] + parts[1], whole)
        assert parts[0] + parts[1] == parts[1].merge(parts[0])  # exactly


def test_integers_are_exact_under_any_split_order_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, param = integers(60, 40)
    whole = GradientSums.from_tensors(grad, param, 0.5, padding=40)
    assert whole.l1 == int(grad.abs().long().sum())
    assert whole.l2_squared == int(grad.long().square().sum())
    assert whole.weighted_inner == int((grad.long() * param.long()).sum()) / 2
    monkeypatch.setattr(sums, "CHUNK", 64)
    assert GradientSums.from_tensors(grad.t(), param.t().contiguous(), 0.5, padding=40) == whole
    rows = [
        GradientSums.from_tensors(g, p, 0.5, padding=40 * (i == 3))
        for i, (g, p) in enumerate(zip(grad, param, strict=True))
    ]
    assert sum(rows, GradientSums()) == sum(reversed(rows), GradientSums()) == whole
    a, b, c = rows[:3]
    assert (a + b) + c == a + (b + c)


def test_each_group_has_its_own_lambda() -> None:
    grad, param = tensors(50)
    decayed, free = GradientSums.from_tensors(grad, param, 0.5), GradientSums.from_tensors(grad, 9 * param, 0.0)
    expected = 0.5 * float(grad.double() @ param.double()) + 2 * float(grad.double().abs().sum())
    assert (decayed + free).kkt_residual == pytest.approx(expected, rel=1e-12)
    assert (decayed + free).linf_param == pytest.approx(9 * float(param.abs().max()))
    assert (decayed + free).linf_weighted == pytest.approx(0.5 * float(param.abs().max()))


def test_the_kkt_residual_is_zero_at_the_known_optimum_in_a_box() -> None:
    """min 1/2 ||theta - t||^2 with |theta_i| <= 1 / lambda: the optimum clips t; elements inside have no gradient."""
    target = torch.tensor([-7.0, 0.3, 3.1, 12.0, -1.9], dtype=torch.float64)
    optimum = target.clamp(-2.0, 2.0)
    at_optimum = GradientSums.from_tensors(optimum - target, optimum, 0.5)
    assert at_optimum.kkt_residual == pytest.approx(0.0, abs=1e-14)
    assert at_optimum.l1 > 16.0
    assert at_optimum.linf_weighted == 1.0
    inside = optimum * 0.9
    assert GradientSums.from_tensors(inside - target, inside, 0.5).kkt_residual > 0.1


@pytest.mark.parametrize("d", [1, 2, 100])
def test_the_ratio_lies_between_1_and_sqrt_d_and_reaches_both(d: int) -> None:
    sparse, flat = torch.zeros(d), torch.full((d,), -3.0)
    sparse[0] = 2.0
    assert GradientSums.from_tensors(sparse, flat).ratio == 1.0
    assert GradientSums.from_tensors(flat, flat).ratio_over_sqrt_d == pytest.approx(1.0, rel=1e-15)
    ratio = GradientSums.from_tensors(*tensors(d)).ratio
    assert 1.0 <= ratio <= math.sqrt(d)


def test_an_isotropic_gaussian_gives_sqrt_2_over_pi() -> None:
    """Standard error sqrt((pi - 3) / pi / d) = 2.1e-4 at d = 1e6; five of them."""
    grad = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    measured = GradientSums.from_tensors(grad, grad).ratio_over_sqrt_d
    assert measured == pytest.approx(math.sqrt(2 / math.pi), abs=1.1e-3)


def test_a_zero_gradient_has_no_ratio() -> None:
    for grad in (None, torch.zeros(4)):
        zero = GradientSums.from_tensors(grad, torch.ones(4), 0.1)
        assert (zero.l1, zero.l2, zero.d, zero.kkt_residual) == (0.0, 0.0, 4, 0.0)
        assert math.isnan(zero.ratio)
    assert math.isnan(GradientSums().ratio_over_sqrt_d)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stays_visible_after_every_merge(bad: float) -> None:
    grad, param = tensors(10)
    good = GradientSums.from_tensors(grad, param, 0.1)
    grad[3] = bad
    merged = good + GradientSums.from_tensors(grad, param, 0.1) + good
    assert (merged.nonfinite, merged.d) == (1, 30)
    assert not math.isfinite(merged.l1)
    assert math.isnan(merged.ratio)
    param[4] = bad
    for merged in (good + GradientSums.from_tensors(None, param), GradientSums.from_tensors(None, param) + good):
        assert (merged.nonfinite, merged.linf_param) == (1, math.inf)


def test_all_sums_of_all_ranks_travel_in_one_sum() -> None:
    world = 3
    per_rank = [
        [GradientSums.from_tensors(*tensors(20 + rank, seed=10 * rank + i), 0.1, padding=rank) for i in range(2)]
        for rank in range(world)
    ]
    reduced = sum(pack(mine, rank, world) for rank, mine in enumerate(per_rank))
    for i, whole in enumerate(unpack(reduced, world)):
        assert close(whole, sum((mine[i] for mine in per_rank), GradientSums()))
        assert whole.linf_param == max(mine[i].linf_param for mine in per_rank)
        assert (whole.d, whole.d_padding) == (63, 3)
    one = per_rank[0][0]
    assert GradientSums.from_vector(one.to_vector()) == one


def test_what_cannot_be_summed_is_refused() -> None:
    vector = torch.ones(4)
    with pytest.raises(LionError, match=r"shape \(3,\) for a parameter of shape \(4,\)"):
        GradientSums.from_tensors(torch.ones(3), vector)
    with pytest.raises(LionError, match=r"layout torch\.sparse_coo"):
        GradientSums.from_tensors(vector.to_sparse(), vector)
    with pytest.raises(LionError, match="padding must lie between 0 and the 4 elements"):
        GradientSums.from_tensors(vector, vector, padding=5)
    with pytest.raises(LionError, match="weight_decay must be a finite number"):
        GradientSums.from_tensors(vector, vector, -0.1)
    with pytest.raises(LionError, match=r"of 2 ranks has shape \(10,\), got \(4,\)"):
        GradientSums.from_vector(vector, 2)


@pytest.mark.parametrize(
    ("signal", "noise"), [(1.0, 0.0), (1.0, 1e-5), (1.0, 3e-4), (1.0, 0.1), (0.1, 1.0), (0.0, 1.0)]
)
@pytest.mark.parametrize("size", [7, 3 * sums.FP64_BELOW])
def test_the_mean_of_5000_batches_is_right_to_1e_6_in_one_copy(signal: float, noise: float, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    true = signal * torch.randn(size, generator=generator)
    mean, exact = MeanGradient([true]), torch.zeros(size, dtype=torch.float64)
    for _ in range(5000):
        grad = true + noise * torch.randn(size, generator=generator)
        mean.add([grad])
        exact += grad
    expected = GradientSums.from_tensors(exact / 5000, true)
    measured = GradientSums.from_tensors(mean.means[0], true)
    assert mean.means[0].dtype == (torch.float64 if size < sums.FP64_BELOW else torch.float32)
    assert measured.l1 == pytest.approx(expected.l1, rel=1e-6)
    assert measured.l2 == pytest.approx(expected.l2, rel=1e-6)


def test_a_running_sum_in_float32_would_not_be_right_to_1e_6() -> None:
    """Nearly equal gradients, as of a bias: a sum rounds each the same way. The defect that the mean avoids."""
    generator = torch.Generator().manual_seed(0)
    true = torch.full((3 * sums.FP64_BELOW,), 0.1)
    mean, running, exact = MeanGradient([true]), torch.zeros_like(true), torch.zeros(len(true), dtype=torch.float64)
    for _ in range(5000):
        grad = true + 1e-5 * torch.randn(len(true), generator=generator)
        mean.add([grad])
        running += grad
        exact += grad
    l1 = [GradientSums.from_tensors(g, true).l1 for g in (exact / 5000, mean.means[0], running / 5000)]
    assert l1[1] == pytest.approx(l1[0], rel=1e-6)
    assert l1[2] != pytest.approx(l1[0], rel=1e-6)


def test_the_mean_takes_weights_and_absent_gradients() -> None:
    a, b = torch.tensor([4.0, 0.0]), torch.tensor([[8.0]])
    mean = MeanGradient([a, b])
    mean.add([a, None], weight=1.0)
    mean.add([None, b], weight=3.0)
    assert [m.tolist() for m in mean.means] == [[1.0, 0.0], [[6.0]]]
    assert mean.sum_squared == (1 * 16 + 3 * 64) / 2
    assert a.tolist() == [4.0, 0.0]
    with pytest.raises(LionError, match="dense gradients"):
        mean.add([a.to_sparse(), b])
