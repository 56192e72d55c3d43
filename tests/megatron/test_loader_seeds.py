"""Random seeds of data loaders: on the CPU they follow torch's, and those of a round its iteration and its rank."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_lion.integration.cpu import torch_cuda
from megatron_lion.integration.reporting.norm_ratio import round_data

SAMPLES = list(range(50))


@pytest.fixture
def separate_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataLoader, "__init__", DataLoader.__init__)  # put back at the end
    torch_cuda._separate_data_loaders()


def order(**options: Any) -> list[int]:
    return [int(sample) for sample in DataLoader(SAMPLES, batch_size=None, shuffle=True, **options)]  # type: ignore[arg-type]


@pytest.mark.usefixtures("separate_loaders")
def test_a_loader_on_the_cpu_shuffles_by_torchs_seed_and_draws_nothing_from_training() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = order()
    assert torch.equal(torch.get_rng_state(), before), "dropout would be shifted"
    torch.rand(100)
    assert order() == first, "a resumed run makes its loader later"
    assert order(generator=None) == first
    torch.manual_seed(6)
    assert sorted(order()) == SAMPLES and order() != first
    torch.set_rng_state(before)
    assert order() == first, "the state that a checkpoint restores has the seed"


@pytest.mark.usefixtures("separate_loaders")
def test_a_loader_on_the_cpu_keeps_the_generator_that_it_is_given() -> None:
    generator = torch.Generator().manual_seed(1)
    given = DataLoader(SAMPLES, 1, True, None, None, 0, None, False, False, 0, None, None, generator)  # type: ignore[arg-type]
    assert given.generator is generator
    assert DataLoader(SAMPLES, generator=generator).generator is generator  # type: ignore[arg-type]


class Noise(Dataset[torch.Tensor]):
    """Draws each sample at random in the worker that reads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def test_workers_of_a_round_draw_by_its_iteration_and_rank() -> None:
    pytest.importorskip("megatron.core")
    args = Namespace(num_workers=1, exit_signal_handler=False)

    def drawn(*seed: int) -> list[float]:
        iterator = round_data.iterators([Noise()], None, [[0, 1], [2, 3]], args, seed=seed)
        return [value for _ in range(2) for value in next(iterator).tolist()]

    before = torch.get_rng_state()
    seeds = [(1, 10, 0), (1, 10, 1), (1, 20, 0), (2, 10, 0)]
    found = [drawn(*seed) for seed in seeds]
    assert len({tuple(values) for values in found}) == len(seeds)
    assert drawn(*seeds[0]) == found[0]
    assert torch.equal(torch.get_rng_state(), before)
