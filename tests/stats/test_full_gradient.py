"""The measurement in one call: equal to float64 autograd over all samples, and without a trace afterwards."""

import copy
import json
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from megatron_lion.config import LionError
from megatron_lion.stats import full_gradient

Batch = tuple[Tensor, Tensor]


class TiedModel(nn.Module):
    """Embedding tied to the output layer, BatchNorm, dropout, a frozen and an unused parameter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.middle = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(12, 30)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(12), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)) * self.frozen)


# Linear 144 + 12, BatchNorm 24, embedding 360 once, output bias 30, unused 5.
COUNTED = 575


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def model(dropout: float = 0.0) -> TiedModel:
    torch.manual_seed(0)
    return TiedModel(dropout)


def batches(count: int = 12, size: int = 16) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(*torch.randint(30, (2, size), generator=generator).unbind(),) for _ in range(count)]


def reference(net: nn.Module, data: list[Batch], lambdas: Callable[[str], float]) -> dict[str, float]:
    """l1, l2, d, loss and KKT residual by float64 autograd of one loss over all batches."""
    net = copy.deepcopy(net).double()
    loss = torch.stack([loss_fn(net, batch) for batch in data]).mean()
    loss.backward()
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]
    l1 = float(sum(g.abs().sum() for g in grads))
    inner = float(sum(lambdas(name) * (g * p.detach()).sum() for (name, p), g in zip(named, grads, strict=True)))
    return {
        "l1": l1,
        "l2": math.sqrt(float(sum(g.square().sum() for g in grads))),
        "d": sum(p.numel() for _, p in named),
        "loss": float(loss.detach()),
        "kkt_residual": l1 + inner,
        "linf_param": max(float(p.detach().abs().max()) for _, p in named),
    }


def test_the_record_equals_float64_autograd_over_all_batches() -> None:
    net, data = model(), batches()
    groups = [
        {"params": [p for n, p in net.named_parameters() if n.endswith("weight")], "weight_decay": 0.3},
        {"params": [p for n, p in net.named_parameters() if not n.endswith("weight")], "weight_decay": 0.0},
    ]
    record = full_gradient(net, data, loss_fn, weight_decay=groups, prefixes=(5,))
    expected = reference(net, data, lambda name: 0.3 if name.endswith("weight") else 0.0)
    for key, value in expected.items():
        assert getattr(record, key) == pytest.approx(value, rel=1e-6), key
    assert record.d == COUNTED
    assert record.ratio == record.l1 / record.l2
    first = full_gradient(net, data[:5], loss_fn)
    assert record.prefixes == {5: first.ratio}


def test_the_noise_is_that_of_the_batches_gradients() -> None:
    net, data = model(), batches()
    single = [full_gradient(net, [batch], loss_fn).l2 ** 2 for batch in data]
    record = full_gradient(net, data, loss_fn)
    sigma2 = (sum(single) - 12 * record.l2**2) / 11
    assert record.sigma2 == pytest.approx(sigma2, rel=1e-9)
    assert record.snr == pytest.approx((record.l2**2 - sigma2 / 12) / (sigma2 / 12), rel=1e-9)


def test_a_tied_parameter_counted_twice_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect put in, every name of a parameter counted: the numbers that the reference test compares differ."""
    net, data = model(), batches()
    right = full_gradient(net, data, loss_fn)
    assert right.d == COUNTED
    every_name = {name: p for name, p in net.named_parameters(remove_duplicate=False) if p.requires_grad}
    # The function of the same name hides the module.
    module = sys.modules["megatron_lion.stats.full_gradient"]
    monkeypatch.setattr(module, "_counted_parameters", lambda model: every_name)
    wrong = full_gradient(net, data, loss_fn)
    assert wrong.d == COUNTED + 360
    for key in ("l1", "l2", "ratio"):
        assert getattr(wrong, key) != pytest.approx(getattr(right, key), rel=1e-2), key


def test_batches_may_be_weighted_by_their_samples() -> None:
    """The last batch of a loader is smaller: with weights the mean is still over all samples."""
    net, (x, y) = model().eval(), batches(1, 50)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    record = full_gradient(net, loader, lambda m, batch: (loss_fn(m, batch), len(batch[0])))
    whole = full_gradient(net, [(x, y)], loss_fn)
    assert record.batches == 4
    for key in ("loss", "l1", "l2", "ratio"):
        assert getattr(record, key) == pytest.approx(getattr(whole, key), rel=1e-6), key
    assert full_gradient(net, loader, loss_fn).l1 != pytest.approx(whole.l1, rel=1e-3)


def trace(net: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """Everything that a measurement must leave alone."""
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in net.parameters()],
        "modes": [module.training for module in net.modules()],
        "torch": torch.get_rng_state(),
        "generator": generator.get_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return numpy.array_equal(a, b) if isinstance(a, numpy.ndarray) else a == b


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_disturbed(fails: bool) -> None:
    net, generator = model(dropout=0.5), torch.Generator().manual_seed(3)
    data = batches(1, 64)[0]
    loss_fn(net, data).backward()
    net.head.eval()
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True, generator=generator)

    def careless(m: nn.Module, batch: Any) -> Tensor:
        random.random()
        numpy.random.rand()
        m.middle[1].running_mean = torch.full((12,), 9.0)
        loss = loss_fn(m.train(), batch)
        return loss * math.nan if fails else loss

    before = trace(net, generator)
    with torch.no_grad():  # a caller's no_grad must not matter either
        if fails:
            with pytest.raises(LionError, match=r"loss_fn of batch 0 \(counted from 0\) returned nan"):
                full_gradient(net, loader, careless)
        else:
            assert full_gradient(net, loader, careless).batches == 4
        assert not torch.is_grad_enabled()
    assert equal(before, trace(net, generator))


def test_one_call_on_a_loader_that_shuffles_by_the_global_state_leaves_it_as_it_was() -> None:
    net, data = model(dropout=0.5), batches(1, 64)[0]
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    full_gradient(net, loader, loss_fn)
    assert torch.equal(torch.rand(3), expected)


def test_one_call_leaves_the_generator_of_a_batch_samplers_own_sampler_as_it_was() -> None:
    data, generator = TensorDataset(*batches(1, 64)[0]), torch.Generator().manual_seed(3)
    shuffled = torch.utils.data.RandomSampler(data, generator=generator)
    loader = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(shuffled, 16, False))
    before = generator.get_state()
    full_gradient(model(), loader, loss_fn)
    assert torch.equal(generator.get_state(), before)


def test_a_record_in_bf16_is_accumulated_in_better_than_bf16() -> None:
    net = nn.Linear(4, 3).bfloat16()
    inputs = [torch.full((1, 4), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    record = full_gradient(net, inputs, lambda m, x: m(x).sum())
    assert record.l1 == pytest.approx(3 * 4 * 259 / 4 + 3, rel=1e-12)


def test_one_batch_and_a_zero_gradient_give_null_not_an_error() -> None:
    record = full_gradient(model(), batches(1), loss_fn)
    assert (record.sigma2, record.noise_scale, record.snr, record.converged) == (None, None, None, None)
    net = nn.Linear(2, 1)
    zero = full_gradient(net, [torch.zeros(1)] * 4, lambda m, x: (m.weight * x).sum(), prefixes=(2,))
    assert math.isnan(zero.ratio)
    parsed = json.loads(zero.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (parsed["ratio"], parsed["prefixes"], parsed["converged"], parsed["l2"]) == (None, {"2": None}, False, 0.0)


def test_a_gradient_that_is_not_finite_is_counted_though_the_loss_is_finite() -> None:
    net = nn.Linear(2, 1, bias=False)
    record = full_gradient(net, [torch.ones(1)] * 2, lambda m, x: (m.weight * 0.0).sqrt().sum())
    assert record.nonfinite == 2
    assert json.loads(record.to_json())["ratio"] is None


def test_the_rule_says_converged_for_a_signal_and_not_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(4000, generator=generator) for _ in range(100)]
    net = nn.Linear(4000, 1)
    assert full_gradient(net, noise, lambda m, x: m(x).mean()).converged is False
    assert full_gradient(net, noise, lambda m, x: m(2.0 + x).mean()).converged is True


def test_errors_say_what_to_do() -> None:
    net, data = model(), batches(1)

    def changes(m: nn.Module, batch: Any) -> Tensor:
        loss = loss_fn(m, batch)
        with torch.no_grad():
            m.unused.add_(1.0)
        return loss

    cases: list[tuple[str, Callable[[], Any]]] = [
        ("got no batches; an iterator can be used only once", lambda: full_gradient(net, [], loss_fn)),
        (r"one number in a tensor, got shape \(16, 30\)", lambda: full_gradient(net, data, lambda m, b: m(b[0]))),
        ("one number in a tensor, got float", lambda: full_gradient(net, data, lambda m, b: 1.0)),
        ("without a graph", lambda: full_gradient(net, data, lambda m, b: loss_fn(m, b).detach())),
        ("returned the weight 0.0", lambda: full_gradient(net, data, lambda m, b: (loss_fn(m, b), 0))),
        ("loss_fn changed parameter unused", lambda: full_gradient(net, data, changes)),
        ("no parameter with requires_grad", lambda: full_gradient(nn.Tanh(), data, loss_fn)),
        ("weight_decay must be a finite", lambda: full_gradient(net, data, loss_fn, weight_decay=-1.0)),
        (
            "no group of weight_decay holds unused, middle",
            lambda: full_gradient(net, data, loss_fn, weight_decay=[{"params": list(net.head.parameters())}]),
        ),
    ]
    for message, call in cases:
        with pytest.raises(LionError, match=message):
            call()
    twin = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    twin["b"].weight = nn.Parameter(twin["a"].weight.data)
    with pytest.raises(LionError, match=r"a\.weight and b\.weight are two parameters in one memory"):
        full_gradient(twin, data, loss_fn)


# ---- a whole split ----


def loader(count: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batches(1, count)[0]), batch_size=8, **options)


def weighted(net: nn.Module, batch: Any) -> tuple[Tensor, float]:
    return loss_fn(net, batch), len(batch[0])


def test_an_exact_record_is_that_of_the_split_however_it_is_cut() -> None:
    net = model().eval()  # BatchNorm's statistics would be those of each batch
    whole = full_gradient(net, batches(1, 20), loss_fn, exact=True)
    cut = full_gradient(net, loader(20), weighted, exact=True)
    assert (whole.exact, whole.converged, cut.exact, cut.converged) == (True, True, True, True)
    assert [cut.loss, cut.l1, cut.l2] == pytest.approx([whole.loss, whole.l1, whole.l2], rel=1e-6)
    assert json.loads(cut.to_json())["exact"] is True
    assert not full_gradient(net, loader(16), loss_fn).exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_last": True}, "drops its last batch"),
        ({"sampler": torch.utils.data.RandomSampler(range(20), replacement=True)}, "draws with replacement"),
        ({"sampler": torch.utils.data.SubsetRandomSampler(range(12))}, "sampler gives 12"),
        ({}, "last batch is smaller"),
    ],
)
def test_exact_refuses_a_loader_that_does_not_give_each_sample_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LionError, match=message):
        full_gradient(model(), loader(20, **options), loss_fn, exact=True)
