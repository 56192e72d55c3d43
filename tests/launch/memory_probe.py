"""Run under torchrun in the place of launch/pretrain_gpt.py: one optimizer step, then the bytes that this rank holds.

PROBE_OUTPUT names a folder, in which each rank leaves ``rank<N>.json`` with weights, gradients, state and residuals of
--lion-reduce. With PROBE_NODE=N every N ranks are taken for a node.
"""

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

import megatron_lion
from megatron_lion.exchange.blocks import Residual
from tests.megatron import probe


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def residuals() -> list[Residual]:
    """All that this process holds."""
    return [found for found in gc.get_objects() if isinstance(found, Residual)]


def main() -> None:
    if "PROBE_NODE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["PROBE_NODE"]
    megatron_lion.register()
    import megatron.training.training as training

    def inspect(forward_step: Any, model: list[Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        probe.set_gradients(model, seed=0)
        optimizer.step()
        held = {
            "weights": size(param for chunk in model for param in chunk.parameters()),
            "gradients": size(buffer.grad_data for chunk in model for buffer in chunk.buffers),
            "state": probe.state_bytes(optimizer),
            "residual": size(tensor for residual in residuals() for tensor in residual if tensor is not None),
        }
        path = Path(os.environ["PROBE_OUTPUT"]) / f"rank{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(held))
        return 0, 0

    training.train = inspect
    probe.pretrain_gpt.main()


if __name__ == "__main__":
    main()
