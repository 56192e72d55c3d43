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
from megatron_lion.stats import GradientRecord, full_gradient
from megatron_lion.stats.writer import RecordFile
from tools.paper.vision import image_data
from tools.paper.vision.ranks import Ranks


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

    Over several ranks each trains on its part of every batch, with BatchNorm over that part, as usual; the statistics
    and the test share out whole batches, so that they are those of one process at the same weights.

    Args:
        settings: what to run.
        images: the data.
        model: on ``device``, as it starts.
        folder: gone on with where it holds a checkpoint of the same settings; LionError where of others. The first rank
            writes it, all ranks read it.
        ranks: this process among those of the run, and its device.
        workers: processes that load images.
    """

    def __init__(
        self,
        settings: Settings,
        images: image_data.Images,
        model: nn.Module,
        folder: Path,
        *,
        ranks: Ranks,
        workers: int,
    ) -> None:
        self.settings, self.images, self.model, self.folder = settings, images, model.to(ranks.device), folder
        self.ranks, self.device, self.workers, self.epoch = ranks, ranks.device, workers, 0
        self.optimizer = make_optimizer(settings, model)
        self.records, self.checkpoint = RecordFile(folder / "epochs.jsonl"), folder / "checkpoint.pt"
        self.steps = math.ceil(len(images.train) / settings.batch)  # type: ignore[arg-type]
        if self.checkpoint.is_file():
            self._load()
        self.trained = ranks.wrap(self.model)
        if ranks.rank == 0 and (moved := self.records.resume(self.epoch * self.steps)):
            print(f"  {moved}")

    def run(self) -> None:
        """The epochs that are left."""
        while self.epoch < self.settings.epochs:
            began = time.monotonic()
            self._train()
            record, top1 = self._statistics(), self._test()
            self.epoch += 1
            if self.ranks.rank == 0:
                self._write(record, top1)
                left = (time.monotonic() - began) * (self.settings.epochs - self.epoch) / 60
                text = f"  {self.folder.name} epoch {self.epoch}/{self.settings.epochs}: loss {record.loss:.4f}"
                text += f"  top-1 {100 * top1:.2f} %  r {record.ratio:.1f} = {record.ratio_over_sqrt_d:.3f} sqrt(d)"
                print(f"{text}  about {left:.0f} min left", flush=True)
        self.ranks.wait()  # for what the first writes

    def _write(self, record: GradientRecord, top1: float) -> None:
        first = {"iteration": self.epoch * self.steps, "epoch": self.epoch, "epochs": self.settings.epochs}
        first |= {"top1": top1, "model": self.settings.model, "optimizer": self.settings.optimizer}
        first |= {"lr": self.settings.lr, "data": f"{self.settings.dataset}, {len(self.images.train):,} images"}  # type: ignore[arg-type]
        self.records.append(record.to_json(first))
        self._save()

    def _train(self) -> None:
        self.trained.train()
        world, rank = self.ranks.world, self.ranks.rank
        # A last batch that is too small for two images a rank, as BatchNorm needs, is left out.
        every = image_data.cut(self.images.train, self.settings.batch, self._seed())
        batches = [one for one in every if len(one) >= 2 * world]
        own = image_data.loader(self.images.train, [one[rank::world] for one in batches], workers=self.workers)
        torch.manual_seed(self._seed() + (rank << 40))  # dropout's and the augmentation's are each rank's own
        for step, batch in enumerate(own):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, self.epoch + (step + 1) / self.steps)
            loss, images = self._loss(self.trained, batch)
            loss = loss * (images * world / len(batches[step]))  # the ranks' mean is that over the batch's images
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

    def _statistics(self) -> GradientRecord:
        """f and its gradient over all training images, parameters fixed, in training mode as the loss trained on."""
        self.model.train()
        batches = image_data.cut(self.images.train_plain, self.settings.batch)
        own = image_data.loader(
            self.images.train_plain, batches[self.ranks.rank :: self.ranks.world], workers=self.workers
        )
        share, decays = self.ranks.share(len(batches)), self.optimizer.param_groups
        return full_gradient(self.model, own, self._loss, weight_decay=decays, share=share, exact=True)

    @torch.no_grad()
    def _test(self) -> float:
        self.ranks.take_buffers(self.model)
        self.model.eval()
        batches = image_data.cut(self.images.test, self.settings.batch)[self.ranks.rank :: self.ranks.world]
        counts = torch.zeros(2, dtype=torch.int64)  # right, all
        for images, labels in image_data.loader(self.images.test, batches, workers=self.workers):
            right = self.model(images.to(self.device)).argmax(1).cpu() == labels
            counts += torch.tensor([int(right.sum()), len(labels)])
        self.ranks.sum(counts)
        return int(counts[0]) / int(counts[1])

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
