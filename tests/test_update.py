"""The update rule against an independent reference in numpy, and the properties that follow from Algorithm 1."""

import itertools

import numpy as np
import pytest
import torch

from megatron_lion.update import compute_dtype, lion_step
from tests.kernel_calls import reference

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ALL_DTYPES = (FP64, FP32, BF16, FP16)
SHAPES = [(), (1009,), (37, 53), (3, 5, 7), (0,), (4, 0, 3)]
COUNT = sum(int(np.prod(shape)) for shape in SHAPES)
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
# Every number in a dyadic case is a small multiple of a power of two, so that every dtype computes it exactly.
DYADIC = {"lr": 2**-4, "beta1": 0.5, "beta2": 0.75, "weight_decay": 0.5}


def bits(tensor):
    """The tensor's bits as integers: unlike ==, they tell -0.0 from 0.0 and one NaN equals itself."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def tensors(flat, dtype):
    """The numpy vector ``flat`` cut into one tensor for each of SHAPES."""
    parts = torch.from_numpy(flat).to(dtype).split([int(np.prod(shape)) for shape in SHAPES])
    return [part.clone().reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def flat(parts):
    """The reverse of :func:`tensors`, in fp64."""
    return torch.cat([part.reshape(-1) for part in parts]).double().numpy()


def gradients(rng, count, dtype):
    """Gradients over six decades, a tenth of them zero, the first fifth of the elements always; exact in ``dtype``."""
    g = rng.standard_normal(count) * np.logspace(-4, 2, count)[::-1]
    g[rng.random(count) < 0.1] = 0.0
    g[: count // 5] = 0.0
    return torch.from_numpy(g).to(dtype).double().numpy()


def reference_step(theta, g, m, e_theta, e_m, *, u, lr, beta1, beta2, weight_decay):
    """Algorithm 1 in fp64, with bounds of what arithmetic of unit roundoff ``u`` can have made of it (running errors).

    ``e_theta`` and ``e_m`` bound the errors that theta and m bring along. A product with a rounded factor is
    off by 2u, a sum by u: 3u in all, 4u with the second order. ``tie`` marks the elements where c may have the other
    sign, or none. Where c is zero because all of it is zero nothing is rounded, and nothing is uncertain.
    """
    c = beta1 * m + (1 - beta1) * g
    e_c = beta1 * e_m + 4 * u * (beta1 * (np.abs(m) + e_m) + (1 - beta1) * np.abs(g))
    tie = (np.abs(c) <= e_c) & (e_c > 0)
    new_theta = theta - lr * (np.sign(c) + weight_decay * theta)
    size = lr * (1 + weight_decay * (np.abs(theta) + e_theta))
    e_theta = (1 + lr * weight_decay) * e_theta + u * (6 * size + 2 * np.abs(new_theta))
    new_m = beta2 * m + (1 - beta2) * g
    e_m = beta2 * e_m + 4 * u * (beta2 * (np.abs(m) + e_m) + (1 - beta2) * np.abs(g))
    return new_theta, new_m, e_theta, e_m, tie


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.9), (0.0, 0.9)])
@pytest.mark.parametrize("dtype", [FP64, FP32])
def test_a_thousand_steps_follow_algorithm_1(dtype, betas):
    """Tolerance: each element's running bound. It grows by 2u |theta| a step, in fp32 over 1,000 steps to some 1e-4
    where theta is of size 1: below lr, so that a single wrong sign in 1,000 steps is seen. Elements whose c came within
    rounding of zero once (fewer than 1 %) may be off by 2 lr ever after and are left out from then on."""
    hyper = {**HYPER, "beta1": betas[0], "beta2": betas[1]}
    u = torch.finfo(dtype).eps / 2 + 2.0**-53  # the tested arithmetic's and the reference's own
    rng = np.random.default_rng(1)
    theta = rng.standard_normal(COUNT).astype(np.float32).astype(np.float64)
    m = np.zeros(COUNT)
    e_theta, e_m, excluded = np.zeros(COUNT), np.zeros(COUNT), np.zeros(COUNT, dtype=bool)
    params, exp_avgs = tensors(theta, dtype), tensors(m, dtype)
    for _ in range(1000):
        g = gradients(rng, COUNT, FP32)
        reference(params, tensors(g, dtype), exp_avgs, **hyper)
        theta, m, e_theta, e_m, tie = reference_step(theta, g, m, e_theta, e_m, u=u, **hyper)
        excluded |= tie
    assert excluded.mean() < (0.01 if dtype == FP32 else 1e-6)
    assert e_theta.max() < HYPER["lr"]
    assert (np.abs(flat(params) - theta) <= e_theta)[~excluded].all()
    assert (np.abs(flat(exp_avgs) - m) <= e_m).all()


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "momentum_dtype"),
    [(BF16, BF16, BF16), (BF16, FP32, FP32), (BF16, BF16, FP32), (FP32, BF16, BF16), (FP16, FP16, FP32)],
)
def test_each_of_a_thousand_low_precision_steps_is_rounded_once(param_dtype, grad_dtype, momentum_dtype):
    """With bf16 parameters two right trajectories part within a few steps, because storage rounding (2^-8) outweighs
    the update. So every step of the reference starts from the stored state of the tested one. Tolerance: the fp32
    arithmetic lies within the bound e of the reference x, and rounding to storage is monotone, so what is stored is
    between the rounded x - e and x + e. They are the same number but at midpoints: this asks for exact equality there
    too. Each step leaves out the elements with c within rounding of zero."""
    hyper = {**HYPER, "lr": 3e-3}
    rng = np.random.default_rng(2)
    params = tensors(0.1 * rng.standard_normal(COUNT), param_dtype)
    exp_avgs = tensors(np.zeros(COUNT), momentum_dtype)
    no_error, ties = np.zeros(COUNT), 0

    def inside(stored, x, e, dtype):
        low, high = (torch.from_numpy(end).to(dtype).double().numpy() for end in (x - e, x + e))
        return (low <= stored) & (stored <= high)

    for _ in range(1000):
        g = gradients(rng, COUNT, grad_dtype)
        theta, m, e_theta, e_m, tie = reference_step(
            flat(params), g, flat(exp_avgs), no_error, no_error, u=2.0**-24 + 2.0**-53, **hyper
        )
        reference(params, tensors(g, grad_dtype), exp_avgs, **hyper)
        assert (inside(flat(params), theta, e_theta, param_dtype) | tie).all()
        assert inside(flat(exp_avgs), m, e_m, momentum_dtype).all()
        ties += int(tie.sum())
    assert ties < 0.001 * 1000 * COUNT


def documented_step(theta, g, m, *, real, lr, beta1, beta2, weight_decay):
    """The documented order in numpy, where every operation is rounded separately. ``1 - beta`` is a Python float
    (fp64) and is rounded only where it meets the tensor."""
    c = m * real(beta1) + g * real(1.0 - beta1)
    step = np.sign(c) + theta * real(weight_decay)
    return theta - step * real(lr), m * real(beta2) + g * real(1.0 - beta2)


def awkward(dtype, hyper, count=4096):
    """theta, g, m where rounding decides: c within a few units of rounding of zero, signed zeros, denormals."""
    generator = torch.Generator().manual_seed(3)
    theta, m, g = (torch.randn(count, generator=generator, dtype=FP64).to(dtype) for _ in range(3))
    near = slice(0, count // 2)
    wiggle = 1 + torch.randint(-3, 4, (count // 2,), generator=generator) * torch.finfo(dtype).eps
    g[near] = (-m[near].double() * hyper["beta1"] / (1 - hyper["beta1"]) * wiggle).to(dtype)
    tiny = torch.finfo(dtype).tiny
    special = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, 1.0, -1.0], dtype=dtype)
    tail = torch.cartesian_prod(special, special, special)
    for index, tensor in enumerate((theta, g, m)):
        tensor[-len(tail) :] = tail[:, index]
    return theta, g, m


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.99), (0.95, 0.98), (0.5, 0.75)])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
def test_no_operation_is_fused_or_reordered(dtype, betas):
    """alpha=, lerp and fused multiply-add round otherwise: a step must have the documented bits, not only be close."""
    hyper = {**HYPER, "beta1": betas[0], "beta2": betas[1]}
    theta, g, m = awkward(dtype, hyper)
    real = np.float64 if dtype == FP64 else np.float32
    arrays = (tensor.to(compute_dtype(tensor)).numpy() for tensor in (theta, g, m))
    expected_theta, expected_m = documented_step(*arrays, real=real, **hyper)
    assert expected_theta.dtype == expected_m.dtype == real
    reference([theta], [g], [m], **hyper)
    assert same_bits(theta, torch.from_numpy(expected_theta).to(dtype))
    assert same_bits(m, torch.from_numpy(expected_m).to(dtype))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_exact_ties_move_the_parameter_by_weight_decay_alone(dtype):
    """All pairs of m and g from -2 to 2 in quarters: every number is exact in every dtype, and c == 0 where g = -m."""
    quarters = torch.arange(-8, 9, dtype=FP64) / 4
    m, g = torch.cartesian_prod(quarters, quarters).unbind(1)
    theta = torch.where(torch.arange(len(m)) % 2 == 0, 1.5, -1.5).to(FP64)
    tie = g == -m
    assert tie.sum() == 17
    sign = (m + g > 0).double() - (m + g < 0).double()
    expected_theta = theta - 2**-4 * sign - 2**-5 * theta
    param, exp_avg = theta.to(dtype, copy=True), m.to(dtype, copy=True)
    reference([param], [g.to(dtype)], [exp_avg], **DYADIC)
    assert torch.equal(param.double(), expected_theta)
    assert torch.equal(param.double()[tie], theta[tie] * (1 - 2**-5))
    assert torch.equal(exp_avg.double(), (3 * m + g) / 4)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("start", [0.0, 1.0, -1.0])
def test_elements_with_c_zero_do_not_drift(dtype, start):
    """Defect of DeepSpeed's FusedLion (+lr) and CPULion (-lr): a two-way sign moves elements with c == 0. Here each
    gradient is exactly -m, so that c == 0 at every step; without weight decay the parameter must keep its bits."""
    param = torch.linspace(-1, 1, 101, dtype=dtype)
    before, exp_avg = param.clone(), torch.full_like(param, start)
    for _ in range(10):
        reference([param], [-exp_avg], [exp_avg], **{**DYADIC, "weight_decay": 0.0})
    assert same_bits(param, before)
    assert torch.equal(exp_avg, torch.full_like(param, start / 2**10))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_weight_decay_is_not_added_to_the_gradient(dtype):
    """Defect of bitsandbytes' Lion, hidden by tests with weight decay 0: coupled (L2) decay enters c and the momentum.
    Without a gradient decoupled decay only shrinks theta; coupled decay would move it by lr and fill the momentum."""
    param, exp_avg = torch.tensor([1.5, -1.5, 0.0], dtype=dtype), torch.zeros(3, dtype=dtype)
    reference([param], [torch.zeros(3, dtype=dtype)], [exp_avg], **DYADIC)
    assert param.tolist() == [1.5 - 1.5 / 32, -1.5 + 1.5 / 32, 0.0]
    assert exp_avg.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_weight_decay_acts_on_the_old_parameter(dtype):
    """1 - lr (1 + wd 1) with lr = wd = 1/2 is 1/4; decaying what the sign step left would give 3/8."""
    param, exp_avg = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    reference([param], [torch.ones(1, dtype=dtype)], [exp_avg], lr=0.5, beta1=0.5, beta2=0.75, weight_decay=0.5)
    assert param.item() == 0.25


@pytest.mark.parametrize(("lr", "theta", "expected"), [(1 + 3 * 2.0**-9, 1.0, -3 * 2.0**-9), (1e-3, None, None)])
def test_the_learning_rate_is_not_rounded_to_bf16(lr, theta, expected):
    """Defect of bitsandbytes' 8-bit Lion: lr * sign in the parameter's dtype. Rounded to bf16 the first lr is
    1 + 4 * 2^-9. The second case starts at the rounded lr, so that a rounded step would end at zero."""
    rounded = torch.tensor(lr, dtype=BF16).item()
    assert rounded != lr
    theta = rounded if theta is None else theta
    expected = rounded - np.float32(lr) if expected is None else expected
    assert torch.tensor(float(expected), dtype=BF16).item() not in (0.0, theta - rounded)
    param, exp_avg = torch.tensor([theta], dtype=BF16), torch.zeros(1, dtype=BF16)
    reference([param], [torch.ones(1, dtype=BF16)], [exp_avg], **{**HYPER, "lr": lr, "weight_decay": 0.0})
    assert param.item() == torch.tensor(float(expected), dtype=BF16).item()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_gradients_keep_their_bits(dtype):
    """Guards against scaling or decaying the gradient in place: callers log, clip and accumulate it afterwards."""
    theta, g, m = awkward(dtype, HYPER)
    before, version = g.clone(), g._version
    reference([theta], [g], [m], **HYPER)
    assert same_bits(g, before)
    assert g._version == version


def test_lion_step_changes_none_of_its_arguments():
    """Guards against what lion-pytorch's autotuning does: trial runs of the kernel on live parameters."""
    arguments = awkward(FP32, HYPER)
    before, versions = [t.clone() for t in arguments], [t._version for t in arguments]
    first, again = lion_step(*arguments, **HYPER), lion_step(*arguments, **HYPER)
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert all(same_bits(a, b) for a, b in zip(arguments, before, strict=True))
    assert [t._version for t in arguments] == versions


def trajectory(theta, grads, m, **hyper):
    """Parameter and momentum after one step for each of ``grads``."""
    param, exp_avg = theta.clone(), m.clone()
    for grad in grads:
        reference([param], [grad], [exp_avg], **hyper)
    return param, exp_avg


def random_problem(dtype, count=10_007, steps=5):
    generator = torch.Generator().manual_seed(4)
    theta, m, *grads = (torch.randn(count, generator=generator).to(dtype) for _ in range(2 + steps))
    return theta, grads, m


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_negated_inputs_give_negated_results(dtype):
    theta, grads, m = random_problem(dtype)
    param, exp_avg = trajectory(theta, grads, m, **HYPER)
    mirrored_param, mirrored_exp_avg = trajectory(-theta, [-grad for grad in grads], -m, **HYPER)
    assert same_bits(mirrored_param, -param)
    assert same_bits(mirrored_exp_avg, -exp_avg)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("scale", [2.0**-20, 2.0, 2.0**30])
def test_the_scale_of_the_gradients_changes_no_parameter(dtype, scale):
    """From zero momentum; a power of two, because it scales every rounded number exactly."""
    theta, grads, m = random_problem(dtype)
    zero = torch.zeros_like(m)
    param, exp_avg = trajectory(theta, grads, zero, **HYPER)
    scaled_param, scaled_exp_avg = trajectory(theta, [grad * scale for grad in grads], zero, **HYPER)
    assert same_bits(scaled_param, param)
    assert same_bits(scaled_exp_avg, exp_avg * scale)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_shards_equal_the_whole(dtype):
    """Cut at odd places, with empty shards at the start, inside and at the end; views, as in a flat buffer."""
    theta, grads, m = random_problem(dtype)
    whole_param, whole_exp_avg = trajectory(theta, grads, m, **HYPER)
    cuts = [0, 0, 1, 4, 4, 333, 1000, 5001, 10_007, 10_007]
    sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    assert sizes.count(0) == 3
    for grad in grads:
        reference(theta.split(sizes), grad.split(sizes), m.split(sizes), **HYPER)
    assert same_bits(theta, whole_param)
    assert same_bits(m, whole_exp_avg)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_shape_and_memory_layout_change_nothing(dtype):
    theta, grads, m = random_problem(dtype, count=21 * 33)
    flat_param, flat_exp_avg = trajectory(theta, grads, m, **HYPER)
    square = [t.clone().view(21, 33) for t in (theta, m)]
    transposed = [t.t().contiguous().t() for t in square]
    assert not transposed[0].is_contiguous()
    for param, exp_avg in (square, transposed):
        for grad in grads:
            reference([param], [grad.view(21, 33)], [exp_avg], **HYPER)
        assert same_bits(param.reshape(-1), flat_param)
        assert same_bits(exp_avg.reshape(-1), flat_exp_avg)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_equal_betas_give_signsgd_with_momentum(beta):
    """Then c_k is m_k: theta moves along the sign of the momentum that is stored."""
    theta, grads, m = random_problem(FP32, steps=20)
    for grad in grads:
        before = theta.clone()
        reference([theta], [grad], [m], lr=1e-3, beta1=beta, beta2=beta, weight_decay=0.0)
        assert same_bits(theta, before - torch.sign(m) * 1e-3)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_what_non_finite_gradients_do_to_their_own_element_alone(dtype):
    """The rule has no guard: whoever must skip a bad step does so before it. +-inf moves its element by lr and leaves
    the momentum infinite. torch.sign(NaN) is 0, so NaN leaves its element to weight decay and makes the momentum NaN,
    forever. No other element is touched."""
    inf, nan = float("inf"), float("nan")
    param, exp_avg = torch.full((4,), 1.5, dtype=dtype), torch.zeros(4, dtype=dtype)
    reference([param], [torch.tensor([inf, -inf, nan, 1.0], dtype=dtype)], [exp_avg], **DYADIC)
    decayed = 1.5 - 1.5 * 2**-5
    assert param.tolist() == [decayed - 2**-4, decayed + 2**-4, decayed, decayed - 2**-4]
    assert exp_avg.tolist()[:2] == [inf, -inf]
    assert exp_avg[2].isnan()
    assert exp_avg[3].item() == 0.25


@pytest.mark.parametrize("short", ["masters", "grads", "exp_avgs"])
def test_lists_of_different_length_are_refused(short):
    """A plain zip would silently leave out the last parameters."""
    lists = {name: [torch.ones(2), torch.ones(2)] for name in ("masters", "grads", "exp_avgs")}
    lists[short].pop()
    with pytest.raises(ValueError, match=f"one entry per parameter.*'{short}': 1"):
        reference(**lists, **HYPER)


def test_empty_lists_are_accepted():
    reference([], [], [], **HYPER)
