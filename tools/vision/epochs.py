"""Three passes an epoch: training, exact statistics of the full gradient, test. Resumed after any of them."""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import megatron_lion
from megatron_lion.config import LionError
from megatron_lion.stats import full_gradient
from megatron_lion.stats.writer import RecordFile
from vision import data


class Diverged(LionError):
    """The loss was not finite. A finding in a grid of learning rates, an error elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is; a run that is resumed must have the same."""

    dataset: str
    model: str
    optimizer: str
    lr: float
    epochs: int
    batch: int
    weight_decay: float
    seed: int
    size: int
    limit: int | None
    warmup: int = 0
    """epochs, as those of the cool-down"""
    cooldown: int = 0


def learning_rate(settings: Settings, epoch: float) -> float:
    """Linear warm-up, half a cosine to zero, then, where there is a cool-down, a hundredth of the rate."""
    if epoch < settings.warmup:
        return settings.lr * epoch / settings.warmup
    floor = settings.lr / 100 if settings.cooldown else 0.0
    share = (epoch - settings.warmup) / (settings.epochs - settings.warmup - settings.cooldown)
    return floor + (settings.lr - floor) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Lion with its default betas (0.9, 0.99), SGD with momentum 0.9 (the paper does not say), or AdamW."""
    shared = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "lion":
        return megatron_lion.Lion(model.parameters(), **shared)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **shared)
    return torch.optim.AdamW(model.parameters(), **shared)


class VisionRun:
    """A run in a folder: epochs.jsonl, one line an epoch, and checkpoint.pt.

    Args:
        settings: what to run.
        images: the data.
        model: on ``device``, as it starts.
        folder: gone on with where it holds a checkpoint of the same settings; LionError where of others.
    """

    def __init__(
        self, settings: Settings, images: data.Images, model: nn.Module, folder: Path, *, device: str, workers: int
    ) -> None:
        self.settings, self.images, self.model, self.folder = settings, images, model.to(device), folder
        self.device, self.workers, self.epoch = device, workers, 0
        self.optimizer = make_optimizer(settings, model)
        self.records, self.checkpoint = RecordFile(folder / "epochs.jsonl"), folder / "checkpoint.pt"
        self.steps = math.ceil(len(images.train) / settings.batch)  # type: ignore[arg-type]
        if self.checkpoint.is_file():
            self._load()
        if moved := self.records.resume(self.epoch * self.steps):
            print(f"  {moved}")

    def run(self) -> None:
        """The epochs that are left."""
        while self.epoch < self.settings.epochs:
            began = time.monotonic()
            self._train()
            record = self._statistics()
            first = {
                "iteration": (self.epoch + 1) * self.steps,
                "epoch": self.epoch + 1,
                "epochs": self.settings.epochs,
            }
            first |= {"top1": self._test(), "model": self.settings.model, "optimizer": self.settings.optimizer}
            first |= {"lr": self.settings.lr, "data": f"{self.settings.dataset}, {len(self.images.train):,} images"}  # type: ignore[arg-type]
            self.records.append(record.to_json(first))
            self.epoch += 1
            self._save()
            left = (time.monotonic() - began) * (self.settings.epochs - self.epoch)
            text = f"  {self.folder.name} epoch {self.epoch}/{self.settings.epochs}: loss {record.loss:.4f}"
            text += (
                f"  top-1 {100 * first['top1']:.2f} %  r {record.ratio:.1f} = {record.ratio_over_sqrt_d:.3f} sqrt(d)"
            )
            print(f"{text}  about {left / 60:.0f} min left", flush=True)

    def _train(self) -> None:
        self.model.train()
        batches = data.loader(self.images.train, self.settings.batch, workers=self.workers, seed=self._seed())
        torch.manual_seed(self._seed())
        for step, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, self.epoch + (step + 1) / self.steps)
            loss = self._loss(self.model, batch)[0]
            if not math.isfinite(float(loss.detach())):
                raise Diverged(f"the loss is {float(loss.detach())} in epoch {self.epoch + 1}: lower --lr")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _seed(self) -> int:
        return self.settings.seed * 10_000 + self.epoch

    def _loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, float]:
        images, labels = (part.to(self.device) for part in batch)
        return functional.cross_entropy(model(images), labels), float(len(labels))

    def _statistics(self) -> Any:
        """f and its gradient over all training images, parameters fixed, in training mode as the loss trained on."""
        self.model.train()
        batches = data.loader(self.images.train_plain, self.settings.batch, workers=self.workers)
        return full_gradient(self.model, batches, self._loss, weight_decay=self.optimizer.param_groups)

    @torch.no_grad()
    def _test(self) -> float:
        self.model.eval()
        right = total = 0
        for images, labels in data.loader(self.images.test, self.settings.batch, workers=self.workers):
            right += int((self.model(images.to(self.device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
        return right / total

    def _save(self) -> None:
        state = {"settings": vars(self.settings), "epoch": self.epoch, "model": self.model.state_dict()}
        partial = self.checkpoint.with_suffix(".tmp")
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        ours, theirs = vars(self.settings), state["settings"]
        if changed := sorted(key for key in ours if ours[key] != theirs.get(key)):
            was = ", ".join(f"{key}={theirs.get(key)}" for key in changed)
            raise LionError(f"{self.folder} holds a run with {was}: give another --output, or the same settings")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = int(state["epoch"])


def last_epoch(folder: Path) -> dict[str, Any]:
    """The last line of a run's epochs.jsonl."""
    return dict(json.loads((folder / "epochs.jsonl").read_text(encoding="utf-8").splitlines()[-1]))
