"""vision_study.py on scikit-learn's digits: three passes, resume bit for bit, and data that is not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lion.config import LionError
from tests.harness import ROOT
from tools.paper import vision_study
from tools.paper.vision import epochs, image_data, models
from tools.paper.vision.ranks import Ranks

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sklearn", "timm", "torchvision"))),
    reason="needs pip install 'megatron-lion[vision]'",
)
ALONE = Ranks()
DIGITS = {"dataset": "digits", "model": "small", "optimizer": "lion", "lr": 1e-3, "batch": 50, "weight_decay": 0.1}


def small(dropout: float, norm: bool = True) -> nn.Module:
    """A convolution with BatchNorm and dropout: all that has state or draws random numbers."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(288, 10)]
    return nn.Sequential(layers[0], nn.BatchNorm2d(8) if norm else nn.Identity(), *layers[1:])


def start(
    folder: Path, *, limit: int = 220, dropout: float = 0.1, norm: bool = True, ranks: Ranks = ALONE, **changes: Any
) -> epochs.VisionRun:
    settings = epochs.Settings(**{**DIGITS, "epochs": 3, "seed": 1, "size": 8, "limit": limit, **changes})
    images = image_data.load("digits", None, 8, limit)
    return epochs.VisionRun(settings, images, small(dropout, norm), folder, ranks=ranks, workers=0)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start(tmp_path / "whole")
    whole.run()
    interrupted = start(tmp_path / "cut")
    monkeypatch.setattr(interrupted, "_test", iter([0.5]).__next__)  # stops in the second epoch, after its statistics
    with pytest.raises(StopIteration):
        interrupted.run()
    resumed = start(tmp_path / "cut")
    assert resumed.epoch == 1
    resumed.run()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    keys = ("iteration", "loss", "l1", "l2", "ratio")
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]


def test_the_statistics_are_those_of_every_training_image(tmp_path: Path) -> None:
    run = start(tmp_path, epochs=1, dropout=0.0)
    run.run()
    (line,) = lines(tmp_path)
    model = run.model.train()  # the weights that were measured
    batches = list(image_data.loader(run.images.train_plain, image_data.cut(run.images.train_plain, 50), workers=0))
    assert [len(labels) for _, labels in batches] == [50, 50, 50, 50, 20]
    loss = sum(nn.functional.cross_entropy(model(x), y) * len(y) for x, y in batches) / 220
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
    assert (line["batches"], line["d"]) == (5, gradient.numel())
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert line["l1"] == pytest.approx(float(gradient.abs().sum()), rel=1e-5)
    assert line["l2"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def two_ranks(folder: Path, changes: dict[str, Any]) -> None:
    script = Path(__file__).with_name("vision_ranks.py")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line += [str(folder), json.dumps(changes)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    """At equal weights, with BatchNorm over whole batches; an odd number of them, the last one small."""
    still = {"optimizer": "sgd", "lr": 1e-30, "weight_decay": 0.0, "epochs": 1, "dropout": 0.0, "batch": 20}
    start(tmp_path / "one", **still).run()
    two_ranks(tmp_path / "two", still)
    (one,), (two,) = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert one["batches"] == two["batches"] == 11 and one["prefixes"].keys() == two["prefixes"].keys() == {"10"}
    for key in ("loss", "l1", "l2", "ratio", "kkt_residual", "sigma2", "snr", "prefixes"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Without BatchNorm, which sees a rank's part of a batch; the last batch falls in unequal parts."""
    changes = {"optimizer": "sgd", "lr": 0.03, "epochs": 2, "dropout": 0.0, "norm": False, "limit": 221}
    start(tmp_path / "one", **changes).run()
    two_ranks(tmp_path / "two", changes)
    ones, twos = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("one", "two"))
    moved = small(0.0, norm=False).state_dict()
    for key, value in ones.items():
        off = (twos[key] - value).norm() / (value - moved[key]).norm()
        assert off < 1e-4, key
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert two["top1"] == one["top1"] and two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_other_settings_in_the_folder_are_refused_and_named(tmp_path: Path) -> None:
    start(tmp_path, epochs=1, limit=60).run()
    with pytest.raises(LionError, match=r"holds a run with lr=0\.001: give another --output"):
        start(tmp_path, epochs=1, limit=60, lr=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(LionError, match="in epoch 1: lower --lr"):
        start(tmp_path, limit=150, optimizer="sgd", lr=1e30).run()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_grid_goes_on_where_a_rate_diverges_and_keeps_the_models_that_it_searched_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(options: Any, ranks: Any, model: str, optimizer: str, lr: float) -> Path:
        if lr > 1e-3:
            raise epochs.Diverged("the loss is nan")
        record = {"top1": 0.5 + lr, "epochs": 2, "data": "digits, 9 images"}
        (tmp_path / "epochs.jsonl").write_text(json.dumps(record) + "\n")
        return tmp_path

    monkeypatch.setattr(vision_study, "run_one", end)
    for model in ("resnet18", "resnet50"):
        line = f"vision_study.py --dataset digits --grid --models {model} --optimizers lion --output {tmp_path}"
        monkeypatch.setattr(sys, "argv", line.split())
        vision_study.main()
    found = json.loads((tmp_path / "grid.json").read_text())
    assert list(found) == ["resnet18-lion", "resnet50-lion"]
    assert found["resnet18-lion"]["lr"] == 1e-3 and found["resnet18-lion"]["epochs"] == 2
    assert list(found["resnet18-lion"]["tried"].items())[:2] == [("0.003", None), ("0.001", 0.501)]
    monkeypatch.setattr(vision_study, "GRID", (3e-3,))
    with pytest.raises(LionError, match="resnet50 with lion: the loss is nan"):
        vision_study.main()


def test_the_schedules_of_cifar_and_imagenet() -> None:
    shared = {**DIGITS, "lr": 1.0, "seed": 1, "size": 8, "limit": None}
    cifar = epochs.Settings(**shared, epochs=100)
    assert [round(epochs.learning_rate(cifar, at), 6) for at in (0, 50, 100)] == [1.0, 0.5, 0.0]
    imagenet = epochs.Settings(**shared, epochs=90, warmup=10, cooldown=10)
    assert [round(epochs.learning_rate(imagenet, at), 6) for at in (0, 5, 10, 45, 80, 85, 90)] == [
        *(0.0, 0.5, 1.0, 0.505),
        *(0.01, 0.01, 0.01),
    ]


@pytest.mark.parametrize(("name", "place"), [("cifar10", "cifar-10-batches-py/"), ("imagenet", "train/ and val/")])
def test_absent_data_says_what_to_put_where(tmp_path: Path, name: str, place: str) -> None:
    with pytest.raises(LionError, match=f"needs --data DIR, a folder with {place}"):
        image_data.load(name, None, 32)
    with pytest.raises(LionError, match=f"put there {place}"):
        image_data.load(name, tmp_path, 32)


def test_the_papers_models_have_their_sizes_and_weights_of_another_are_refused(tmp_path: Path) -> None:
    counts = {"resnet18": 11_220_132, "resnet50": 23_705_252, "vit_s": 21_704_164}
    for name, count in counts.items():
        model = models.build(name, 100, 224, None)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.01), name
    torch.save(small(0.0).state_dict(), tmp_path / "small.pt")
    with pytest.raises(LionError, match=r"small.pt is of another model"):
        models.build("resnet18", 10, 32, tmp_path / "small.pt")
