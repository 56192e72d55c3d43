"""Which loaders an exact gradient accepts: only those that are known to give each sample once."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from megatron_lion.config import LionError
from megatron_lion.stats import full_gradient
from megatron_lion.stats.round import BatchShare

SAMPLES = TensorDataset(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(SAMPLES.tensors[0])


class Unsized:
    def __getitem__(self, index: int) -> Tensor:
        return SAMPLES.tensors[0][index]


class FirstTwice(SequentialSampler):
    def __iter__(self) -> Iterator[int]:
        return iter([0, 0, *range(2, 10)])


class DropsOne(BatchSampler):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2], [3, 4, 5], [6, 7, 8]])


class Renamed(DataLoader[Any]):
    """A loader that gives the same batches as torch's."""


class Endless(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([next(super().__iter__())] * 3)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


def weighted(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    return loss_fn(model, batch), len(batch[0])


def exact_gradient(loader: Any, loss: Any, share: BatchShare | None = None) -> list[float]:
    torch.manual_seed(0)
    record = full_gradient(nn.Linear(2, 1), loader, loss, exact=True, share=share)
    assert record.exact
    return [record.loss, record.l1, record.l2]


def in_order(size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(SAMPLES, batch_sampler=BatchSampler(SequentialSampler(SAMPLES), size, **options))


@pytest.mark.parametrize(
    ("loader", "loss"),
    [
        (DataLoader(SAMPLES, batch_size=5), loss_fn),
        (DataLoader(SAMPLES, batch_size=16), loss_fn),  # the only batch
        (DataLoader(SAMPLES, batch_size=4, shuffle=True), weighted),
        (Renamed(SAMPLES, batch_size=5), loss_fn),
        (in_order(5, drop_last=True), loss_fn),
        (in_order(4, drop_last=False), weighted),
        (DataLoader(SAMPLES, batch_size=5, sampler=RandomSampler(SAMPLES, num_samples=10)), loss_fn),
        (DataLoader(SAMPLES, batch_size=5, sampler=SubsetRandomSampler(range(10))), loss_fn),
        (DataLoader(SAMPLES, batch_size=5, sampler=range(9, -1, -1)), loss_fn),
        (DataLoader(SAMPLES, batch_size=5, sampler=list(numpy.arange(10)[::-1])), loss_fn),
        (DataLoader(SAMPLES, batch_sampler=[[4, 1, 2, 3], [9, 8], [0, 5, 6, 7]]), weighted),
        (DataLoader(SAMPLES, batch_size=5, sampler=DistributedSampler(SAMPLES, 1, 0)), loss_fn),
        (DataLoader(SAMPLES, batch_size=None, sampler=BatchSampler(SequentialSampler(SAMPLES), 5, False)), loss_fn),
        (DataLoader(SAMPLES, batch_size=None), loss_fn),
        ([SAMPLES[:5], SAMPLES[5:]], loss_fn),
    ],
)
def test_loaders_that_give_each_sample_once_have_the_gradient_of_the_split(loader: Any, loss: Any) -> None:
    assert exact_gradient(loader, loss) == pytest.approx(exact_gradient([SAMPLES[:]], loss_fn), rel=1e-5)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (in_order(4, drop_last=True), "all 10 samples, but the loader drops its last batch"),
        (in_order(4, drop_last=False), "batches differ in size"),
        (DataLoader(SAMPLES, batch_sampler=[[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]), "batches differ in size"),
        (DataLoader(SAMPLES, batch_sampler=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 0]]), "draws some samples twice"),
        (DataLoader(SAMPLES, batch_sampler=[[0, 1], [2, 3]]), "the loader's sampler gives 4"),
        (DataLoader(SAMPLES, batch_size=5, sampler=[-1, *range(9)]), "has other indices than 0 to 9"),
        (DataLoader(SAMPLES, batch_sampler=DropsOne(range(10), 3, False)), "does not know .*DropsOne"),
        (DataLoader(SAMPLES, batch_sampler=(part for part in [[0, 1]])), "does not know .*generator"),
        (
            DataLoader(SAMPLES, 5, sampler=WeightedRandomSampler([1.0] * 10, 10)),
            "does not know .*WeightedRandomSampler",
        ),
        (DataLoader(SAMPLES, 5, sampler=FirstTwice(SAMPLES)), "does not know .*FirstTwice"),
        (DataLoader(SAMPLES, 5, sampler=RandomSampler(SAMPLES, replacement=True)), "draws with replacement"),
        (DataLoader(SAMPLES, 5, sampler=RandomSampler(range(5), num_samples=10)), "RandomSampler draws 10 of 5"),
        (DataLoader(SAMPLES, 5, sampler=SequentialSampler(range(5))), "the loader's sampler gives 5"),
        (DataLoader(SAMPLES, 5, sampler=DistributedSampler(SAMPLES, 2, 0)), "the loader's sampler gives 5"),
        (DataLoader(SAMPLES, 5, sampler=DistributedSampler(SAMPLES, 3, 0)), "DistributedSampler repeats samples"),
        (DataLoader(Stream(), batch_size=5), "Stream has no length"),
        (DataLoader(Unsized(), batch_size=5, sampler=range(10)), "Unsized has no length"),  # type: ignore[arg-type]
        (Endless(SAMPLES, batch_size=5), r"does not know .*Endless.*list of its batches"),
    ],
)
def test_exact_refuses_a_loader_that_it_does_not_know_to_give_each_sample_once(loader: Any, message: str) -> None:
    with pytest.raises(LionError, match=message):
        exact_gradient(loader, loss_fn)


def test_a_rank_that_shares_out_the_batches_may_leave_samples_to_the_others_but_needs_weights() -> None:
    share = BatchShare(rank=0, world=2, batches=1, all_reduce=lambda tensor: tensor)
    loaders = [
        DataLoader(SAMPLES, batch_sampler=[[0, 1, 2, 3, 4]]),
        DataLoader(SAMPLES, batch_size=5, sampler=DistributedSampler(SAMPLES, 2, 0, shuffle=False)),
    ]
    for loader in loaders:
        assert exact_gradient(loader, weighted, share)
        with pytest.raises(LionError, match="batches differ in size"):
            exact_gradient(loader, loss_fn, share)  # another rank's may be smaller
    with pytest.raises(LionError, match="draws some samples twice"):
        exact_gradient(DataLoader(SAMPLES, batch_sampler=[[0, 0]]), weighted, share)
