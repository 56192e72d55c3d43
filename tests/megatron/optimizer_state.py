"""The optimizer state of a whole model, put together from what each rank holds, without any checkpoint code."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Parameter's name over the whole model -> its fp32 master weights ("param") and momentum ("exp_avg"), whole.
State = dict[str, dict[str, Tensor]]


def write(folder: Path, model: list[Any], optimizer: Any) -> None:
    """Leave this rank's shards in ``folder``: values, and where in the whole parameter they belong."""
    from megatron_lion.integration import compat
    from megatron_lion.integration.reporting import gradient_shards

    names = {
        param: re.sub(r"layers\.\d+", f"layers.{layer}", name)  # counted over all pipeline stages
        for chunk in model
        for name, param, layer in gradient_shards.named_parameters(chunk)
        if not gradient_shards.is_tied_copy(param)
    }
    shards = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for param, _, _ in compat.updated_params(part):
            if param in names:
                split = getattr(param, "tensor_model_parallel", False)
                start, stop = compat.shard_range(part, param)
                values = part._get_main_param_and_optimizer_states(param)
                shards.append(
                    {
                        "name": names[param],
                        "piece": gradient_shards.tensor_parallel_rank(param) if split else 0,
                        "dim": param.partition_dim if split else 0,
                        "shape": tuple(param.shape),
                        "start": start,
                        "stop": stop,
                        "values": {key: values[key].detach().float().cpu().clone() for key in ("param", "exp_avg")},
                    }
                )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(shards, folder / f"rank{torch.distributed.get_rank()}.pt")


def read(folder: Path) -> State:
    """The whole state that all ranks left in ``folder``; fails where an element is missing."""
    pieces: dict[str, dict[int, dict[str, Tensor]]] = {}
    dims = {}
    for file in sorted(folder.glob("rank*.pt")):
        for shard in torch.load(file):
            dims[shard["name"]] = shard["dim"]
            piece = pieces.setdefault(shard["name"], {}).setdefault(shard["piece"], {})
            for key, values in shard["values"].items():
                whole = piece.setdefault(key, torch.full(shard["shape"], torch.nan))
                whole.view(-1)[shard["start"] : shard["stop"]] = values
    state = {
        name: {
            key: torch.cat([by_piece[number][key] for number in sorted(by_piece)], dims[name])
            for key in ("param", "exp_avg")
        }
        for name, by_piece in pieces.items()
    }
    holes = [name for name, tensors in state.items() for tensor in tensors.values() if tensor.isnan().any()]
    assert state, f"no rank left anything in {folder}"
    assert not holes, f"nobody holds all of {holes}"
    return state


def differences(one: State, other: State) -> list[str]:
    """The tensors that are not the same in both, bit for bit."""
    assert one.keys() == other.keys(), f"not the same parameters: {sorted(one.keys() ^ other.keys())}"
    return [f"{name} {key}" for name in one for key in one[name] if not torch.equal(one[name][key], other[name][key])]
