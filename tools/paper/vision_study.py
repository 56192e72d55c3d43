"""The paper's vision experiments: ResNet18, ResNet50 and ViT-S on CIFAR-10, CIFAR-100 and ImageNet, Lion against SGD.

    python -m tools.paper.vision_study --dataset cifar100 --data DIR --output runs/vision/cifar100
    python -m tools.paper.vision_study --dataset cifar100 --data DIR --output runs/vision/cifar100 --grid
    python -m tools.paper.vision_study --dataset digits --models resnet18 --epochs 3 --output runs/vision/digits

Every epoch has three passes: training, loss and gradient of the whole training set with the parameters held fixed, and
top-1 accuracy on the test set. Each run leaves epochs.jsonl, which the other tools read as they read norm_ratio.jsonl,
and a checkpoint: the same command goes on where it was stopped. Needs pip install 'megatron-lion[vision]'; nothing is
downloaded. Over several GPUs, --batch remaining that of all of them together:

    torchrun --nproc-per-node 8 -m tools.paper.vision_study --dataset imagenet --data DIR --output runs/vision/imagenet
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from tools.corpus.shards import write_json
from tools.paper.vision.ranks import Ranks, join

GRID = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
# Table A2: by data set and model, Lion's and SGD's. Others take 1e-4 and 1e-2, which nobody searched for.
RATES = {
    ("cifar10", "resnet18"): (3e-6, 1e-6),
    ("cifar100", "resnet18"): (3e-5, 3e-4),
    ("cifar10", "resnet50"): (3e-6, 3e-6),
    ("cifar100", "resnet50"): (3e-5, 1e-4),
    ("cifar10", "vit_s"): (1e-6, 1e-6),
    ("cifar100", "vit_s"): (1e-6, 1e-6),
}
SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "imagenet": 224}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=SIZES, required=True, help="what the models are trained on")
    add("--data", type=Path, metavar="DIR", help="folder of the data set; an error says what belongs there")
    add("--output", type=Path, required=True, metavar="DIR", help="a folder for each run is made in it")
    models = ("resnet18", "resnet50", "vit_s")
    add("--models", nargs="+", choices=models, default=list(models), help="which models (default: all)")
    choices = ("lion", "sgd", "adam")
    add("--optimizers", nargs="+", choices=choices, default=["lion", "sgd"], help="which of them (default: lion sgd)")
    add("--grid", action="store_true", help="every rate of the paper's grid, and the best of each run in grid.json")
    add("--lr", type=float, help="learning rate (default: the paper's)")
    add("--epochs", type=int, help="(default: 100; ImageNet 90: 10 warm-up, 70 cosine, 10 cool-down)")
    add("--batch", type=int, default=64, metavar="N", help="images of a step (default: %(default)s)")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="decoupled weight decay (default: %(default)s)")
    add("--pretrained", type=Path, metavar="FILE", help="timm's ImageNet weights, with which the paper's ViT-S starts")
    add("--limit", type=int, metavar="N", help="the first N images only, for trials")
    add("--seed", type=int, default=0, metavar="N", help="of weights and data (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes that load images (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    return parser.parse_args()


def rates(options: argparse.Namespace, model: str, optimizer: str) -> tuple[float, ...]:
    """The learning rates to run."""
    if options.grid:
        return GRID
    lion, sgd = RATES.get((options.dataset, model), (1e-4, 1e-2))
    return (options.lr or (sgd if optimizer == "sgd" else lion),)


def run_one(options: argparse.Namespace, ranks: Ranks, model: str, optimizer: str, lr: float) -> Path:
    """Run, or go on with, one model with one optimizer at one rate; returns its folder."""
    from tools.paper.vision import epochs, image_data, models

    imagenet = options.dataset == "imagenet"
    size = 224 if model == "vit_s" and options.dataset != "digits" else SIZES[options.dataset]
    if options.dataset == "digits" and model == "vit_s":
        raise LionError("--dataset digits is for the ResNets: ViT-S cuts images into patches of 16 pixels")
    settings = epochs.Settings(
        dataset=options.dataset,
        model=model,
        optimizer=optimizer,
        lr=lr,
        epochs=options.epochs or (90 if imagenet else 100),
        batch=options.batch,
        weight_decay=options.weight_decay,
        seed=options.seed,
        size=size,
        limit=options.limit,
        warmup=10 if imagenet else 0,
        cooldown=10 if imagenet else 0,
    )
    images = image_data.load(options.dataset, options.data, size, options.limit)
    torch.manual_seed(options.seed)
    network = models.build(model, images.classes, size, options.pretrained)
    folder = options.output / f"{model}-{optimizer}{f'-{lr:g}' if options.grid else ''}"
    epochs.VisionRun(settings, images, network, folder, ranks=ranks, workers=options.workers).run()
    return folder


def search(options: argparse.Namespace, ranks: Ranks, model: str, optimizer: str) -> dict[str, Any]:
    """Run every learning rate; the best by the last epoch's top-1, and the top-1 of each (null where it diverged).

    Raises LionError where none is left.
    """
    from tools.paper.vision.epochs import Diverged, last_epoch

    ends: dict[float, dict[str, Any]] = {}
    tried: dict[str, float | None] = {}
    problem: LionError | None = None
    for lr in rates(options, model, optimizer):
        try:
            ends[lr] = last_epoch(run_one(options, ranks, model, optimizer, lr))
        except Diverged as error:
            problem = error
        tried[f"{lr:g}"] = ends[lr]["top1"] if lr in ends else None
    if not ends:
        raise LionError(f"{model} with {optimizer}: {problem}")
    best = max(ends, key=lambda lr: ends[lr]["top1"])
    shared = {key: ends[best][key] for key in ("top1", "epochs", "data")}
    return {"lr": best, **shared, "tried": tried}


def main() -> None:
    """Every model with every optimizer."""
    options = parse()
    ranks = join(options.device)
    if options.batch < 2 * ranks.world:
        raise LionError(f"--batch {options.batch} is of all {ranks.world} ranks together: give two images for each")
    found = {}
    try:
        for model in options.models:
            for optimizer in options.optimizers:
                found[f"{model}-{optimizer}"] = search(options, ranks, model, optimizer)
    except ImportError as error:
        raise LionError(f"{error}: pip install 'megatron-lion[vision]'") from error
    ranks.leave()
    if ranks.rank > 0:
        return
    for name, row in found.items():
        print(f"{name}: lr {row['lr']:g}, top-1 {100 * row['top1']:.2f} %")
    if options.grid:
        path = options.output / "grid.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # of other models
        write_json(path, earlier | found)


if __name__ == "__main__":
    with readable_errors():
        main()
