"""Run on ranks in the place of ``pretrain_gpt.py``: leaves the bytes that each rank holds after its first step.

    real_rank.py <Megatron's flags>

They are read from the memory behind the tensors, not from the formulas of ``integration/rehearsal/sizes.py``. The file
of a rank is SIZES/RANK.json.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import megatron_lion

megatron_lion.register()

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration import compat, loop_callbacks  # noqa: E402


def memory(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind ``tensors``, each piece of it once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def state(optimizer: Any, names: tuple[str, ...]) -> list[torch.Tensor]:
    """The tensors of these names in the state of every parameter."""
    inner = [each.optimizer for each in compat.sub_optimizers_of(optimizer) if each.optimizer is not None]
    return [entry[name] for each in inner for entry in each.state.values() for name in names if name in entry]


def copies(optimizer: Any) -> list[torch.Tensor]:
    """Megatron's own fp32 master weights."""
    return [
        tensor
        for each in compat.sub_optimizers_of(optimizer)
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")
        for group in getattr(each, name, ())
        for tensor in group
        if tensor is not None
    ]


def main() -> None:
    import megatron.training.training as training

    stock_setup = training.setup_model_and_optimizer
    chunks: list[Any] = []

    def setup(*args: Any, **kwargs: Any) -> Any:
        built = stock_setup(*args, **kwargs)
        chunks.extend(built[0])
        return built

    def after_step(optimizer: Any, iteration: int) -> None:
        params = [param for chunk in chunks for param in chunk.parameters()]
        sizes = {
            "parameters": sum(param.numel() for param in params),
            "weights": memory(params),
            "gradients": memory(param.main_grad for param in params),
            "momentum": memory(state(optimizer, ("exp_avg", "exp_avg_scale"))),
            "masters": memory([*state(optimizer, ("master_param",)), *copies(optimizer)]),
        }
        path = Path(os.environ["SIZES"]) / f"{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(sizes), encoding="utf-8")

    training.setup_model_and_optimizer = setup
    loop_callbacks.after_step.append(after_step)
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
