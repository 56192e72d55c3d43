"""The paper's data sets from folders on this machine, and scikit-learn's digits for trials. Nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from megatron_lion.config import LionError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as usual
PLACES = {
    "cifar10": "cifar-10-batches-py/ (cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked)",
    "cifar100": "cifar-100-python/ (cifar-100-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked)",
    "imagenet": "train/ and val/, in each a folder of images for each of the 1,000 classes (https://image-net.org)",
}
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}


@dataclass(frozen=True, kw_only=True)
class Images:
    """A data set: for training, augmented or not, and for testing."""

    name: str
    train: Dataset[Any]
    train_plain: Dataset[Any]
    """the training images without augmentation: the f whose gradient is measured is a function of the weights alone"""
    test: Dataset[Any]

    @property
    def classes(self) -> int:
        return CLASSES[self.name]


def load(name: str, folder: Path | None, size: int, limit: int | None = None) -> Images:
    """The data set ``name`` with images of ``size`` pixels a side, the first ``limit`` of each part if given.

    Raises LionError that says what to put where, if it is not in ``folder``.
    """
    if name == "digits":
        parts = _digits()
    elif folder is None:
        raise LionError(f"--dataset {name} needs --data DIR, a folder with {PLACES[name]}")
    else:
        try:
            parts = _folders(name, folder, size)
        except (RuntimeError, OSError) as error:
            raise LionError(f"--data {folder} does not hold {name} ({error}): put there {PLACES[name]}") from error
    if limit is not None:
        parts = {part: Subset(images, range(min(limit, len(images)))) for part, images in parts.items()}
    return Images(name=name, **parts)


def _digits() -> dict[str, Any]:
    """1,797 handwritten digits of 8 x 8 pixels, every fifth for testing, in three equal channels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).div(16).sub(0.5).unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.tensor(found.target, dtype=torch.int64)
    tested = torch.arange(len(images)) % 5 == 0
    train, test = (TensorDataset(images[part], labels[part]) for part in (~tested, tested))
    return {"train": train, "train_plain": train, "test": test}


def _folders(name: str, folder: Path, size: int) -> dict[str, Any]:
    from torchvision import datasets, transforms

    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if name == "imagenet":
        plain = transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *end])
        varied = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *end])
        make: Callable[[bool, Any], Any] = lambda train, how: datasets.ImageFolder(  # noqa: E731
            str(folder / ("train" if train else "val")), how
        )
    else:
        plain = transforms.Compose([transforms.Resize(size), *end])
        crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        varied = transforms.Compose([*crop, transforms.Resize(size), *end])
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        make = lambda train, how: kind(str(folder), train=train, transform=how, download=False)  # noqa: E731
    return {"train": make(True, varied), "train_plain": make(True, plain), "test": make(False, plain)}


def cut(images: Dataset[Any], batch: int, seed: int | None = None) -> list[list[int]]:
    """The indices of each batch, in order, or shuffled by ``seed`` alone: no epoch's order depends on those before."""
    count = len(images)  # type: ignore[arg-type]
    order = (
        torch.arange(count) if seed is None else torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    )
    return [part.tolist() for part in order.split(batch)]


def loader(images: Dataset[Any], batches: list[list[int]], *, workers: int) -> DataLoader[Any]:
    """The images of ``batches``, batch by batch."""
    return DataLoader(images, batch_sampler=batches, num_workers=workers)
