"""Training on data-parallel ranks that are simulated in one process: one run of tools/paper/reduce_study.py."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_lion.config import CHEN_BETAS
from megatron_lion.lion import Lion
from megatron_lion.update import lion_sign
from tools.paper.studies.rank_gpt import Shape, gradients, mean_loss
from tools.paper.studies.reduce_arms import ARMS, PackedBlocks, Reduce, clipped

RANKS = 4
ALIGNMENT = 64  # of the start of a parameter in the buffer, as in Megatron's
WEIGHT_DECAY = 0.1
WARMUP, FINAL_LR = 20, 0.1  # steps, and the share of the peak that the cosine ends at
VALIDATION = 256  # sequences
SAMPLES = 10  # steps of a run in which signs are compared


@dataclass(frozen=True)
class Corpus:
    """Tokens of the training and of the validation split."""

    train: Tensor
    valid: Tensor

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        """Read what tools/demo_text.py has left in ``folder``, with a vocabulary of at most 65,536."""
        files = (folder / f"{split}_text_document.bin" for split in ("train", "valid"))
        return cls(*(torch.from_numpy(numpy.fromfile(file, dtype=numpy.uint16).astype(numpy.int64)) for file in files))

    def batch(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Random sequences for every rank, int64 [ranks, sequences, length + 1]."""
        starts = torch.randint(len(self.train) - shape.length, (RANKS, shape.sequences, 1), generator=generator)
        return self.train[starts + torch.arange(shape.length + 1)]

    def validation(self, shape: Shape) -> Tensor:
        """The first sequences of the validation split, as one rank's batch."""
        found = self.valid.unfold(0, shape.length + 1, shape.length)[:VALIDATION]
        return found.unsqueeze(0)


class Bucket:
    """All parameters in one flat buffer, as in Megatron's: what the arms need of a bucket."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        shapes = shape.parameters()
        starts, end = {}, 0
        for name, size in shapes.items():
            starts[name] = end
            end += -(-math.prod(size) // ALIGNMENT) * ALIGNMENT
        numel = -(-end // (ALIGNMENT * RANKS)) * ALIGNMENT * RANKS
        self.spans = {name: (start, start + math.prod(shapes[name])) for name, start in starts.items()}
        self.shapes = shapes
        self.grad_data = torch.zeros(numel)
        data = self.views(torch.zeros(numel))
        for name, view in data.items():
            shape.initialize_(name, view, generator)
        self.params = {name: torch.nn.Parameter(view) for name, view in data.items()}
        self.param_to_index = {param: self.spans[name] for name, param in self.params.items()}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of ``flat``, [..., numel], in its shape."""
        return {
            name: flat[..., start:stop].view(*flat.shape[:-1], *self.shapes[name])
            for name, (start, stop) in self.spans.items()
        }


def train(arm: str, shape: Shape, corpus: Corpus, *, seed: int, steps: int, lr: float) -> dict[str, float]:
    """Train and return the validation loss, and what the sampled steps have shown. ``seed`` is that of the
    initialization and of the data."""
    generator = torch.Generator().manual_seed(seed)
    bucket, reduce = Bucket(shape, generator), ARMS[arm]()
    votes = arm == "vote"
    decay = [
        [param for param in bucket.params.values() if (param.dim() > 1) == is_matrix] for is_matrix in (True, False)
    ]
    groups = [{"params": decay[0], "weight_decay": WEIGHT_DECAY}, {"params": decay[1], "weight_decay": 0.0}]
    lion = Lion(groups, lr=lr, betas=(0.0, CHEN_BETAS[1]) if votes else CHEN_BETAS)
    of_ranks = torch.zeros(RANKS, bucket.grad_data.numel())
    samples = []
    start = time.process_time()
    for step in range(steps):
        _, found = gradients(shape, bucket.params, corpus.batch(shape, generator))
        views = bucket.views(of_ranks)
        torch._foreach_copy_([views[name] for name in found], list(found.values()))
        is_sampled = not votes and step % (steps // SAMPLES) == steps // SAMPLES - 1
        reduced, share = _reduce(reduce, bucket, of_ranks, is_sampled=is_sampled)
        if not votes:
            reduced = clipped(reduced)
        if is_sampled:
            samples.append((_unlike_signs(lion, bucket, reduced, of_ranks.sum(0)), share))
        for name, gradient in bucket.views(reduced).items():
            bucket.params[name].grad = gradient
        for group in lion.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        lion.step()
    with torch.no_grad():
        weights = {name: param.unsqueeze(0) for name, param in bucket.params.items()}
        validation = float(mean_loss(shape, weights, corpus.validation(shape)))
    unlike, residual = map(float, torch.tensor(samples or [(math.nan, math.nan)]).mean(0))
    taken = {"validation": validation, "unlike": unlike, "residual": residual}
    return {key: value for key, value in taken.items() if value == value} | {
        "cpu_seconds": round(time.process_time() - start, 1)
    }


def _reduce(reduce: Reduce, bucket: Bucket, of_ranks: Tensor, *, is_sampled: bool) -> tuple[Tensor, float]:
    """The sum, and |e| / |g| where it was sampled and there is a residual, else NaN."""
    reductions: list[Any] = reduce.reductions(bucket, RANKS) if is_sampled and isinstance(reduce, PackedBlocks) else []
    for reduction in reductions:
        reduction.sampling = "norm"
    reduced = reduce(bucket, list(of_ranks))
    kept = [e.values(r.numel).double().square().sum() for r in reductions for e in r.residuals.values()]
    if not kept:
        return reduced, math.nan
    return reduced, math.sqrt(sum(kept) / sum(reduction.sample.gradient for reduction in reductions))


def _unlike_signs(lion: Lion, bucket: Bucket, reduced: Tensor, exact: Tensor) -> float:
    """The share of the elements of matrices with another sign(c) than with the exact gradient, clipped by itself."""
    unlike = elements = 0
    for received, param, uncompressed in zip(
        bucket.views(reduced).values(), bucket.params.values(), bucket.views(clipped(exact)).values(), strict=True
    ):
        if param.dim() > 1:
            momentum = lion.state[param]["exp_avg"]
            signs = (lion_sign(gradient, momentum, CHEN_BETAS[0]) for gradient in (received, uncompressed))
            unlike += int(torch.ne(*signs).sum())
            elements += param.numel()
    return unlike / elements


def _schedule(step: int, steps: int) -> float:
    """The learning rate relative to its peak: a linear warm-up, then a cosine to FINAL_LR."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / (steps - WARMUP)
    return FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * done)) / 2
