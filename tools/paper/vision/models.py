"""The paper's three models, from timm, without a download."""

from pathlib import Path

import torch
from torch import nn

from megatron_lion.config import LionError

NAMES = {"resnet18": "resnet18", "resnet50": "resnet50", "vit_s": "vit_small_patch16_224"}


def build(name: str, classes: int, size: int, pretrained: Path | None) -> nn.Module:
    """The model for images of ``size`` pixels, with the weights of ``pretrained`` but for the last layer if given.

    For images below 64 pixels the ResNets begin with a 3 x 3 convolution and no pooling, as is usual for CIFAR; the
    paper does not say. Raises LionError where the file is not of this model.
    """
    import timm

    options = {"img_size": size} if name == "vit_s" else {}
    model: nn.Module = timm.create_model(NAMES[name], pretrained=False, num_classes=classes, **options)
    if pretrained is not None:
        _load(model, pretrained)
    if name != "vit_s" and size < 64:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def _load(model: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        there = model.state_dict()
        head = {key for key in state if key in there and state[key].shape != there[key].shape}
        missing, unexpected = model.load_state_dict({k: v for k, v in state.items() if k not in head}, strict=False)
    except Exception as error:  # torch and safetensors raise several kinds for a file that is not theirs
        raise LionError(f"--pretrained {path}: {error}; give timm's weights of this model") from error
    if unexpected or set(missing) - head:
        raise LionError(f"--pretrained {path} is of another model: {[*unexpected, *sorted(set(missing) - head)][:3]}")
