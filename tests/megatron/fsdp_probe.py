"""Run under torchrun in the place of ``pretrain_gpt.py``, with Megatron-FSDP: the last rank has a NaN in one step.

    torchrun tests/megatron/fsdp_probe.py <Megatron's flags>

Rank 0 prints a line ``CASE step N: ...`` for each step: whether it was applied, and on how many ranks it changed a
parameter or a momentum.
"""

from typing import Any

import torch

import megatron_lion

megatron_lion.register()

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer  # noqa: E402

BAD_STEP = 3


def local_copies(lion: Any) -> list[torch.Tensor]:
    """Copies of this rank's masters and momenta."""
    lion.init_state()
    params = [param for group in lion.param_groups for param in group["params"]]
    tensors = [param._local_tensor for param in params] + [lion.state[param]["exp_avg"] for param in params]
    return [tensor.detach().clone() for tensor in tensors]


def watch_steps() -> None:
    stock, steps = LionChainedOptimizer.step, []

    def step(chain: LionChainedOptimizer) -> Any:
        steps.append(None)
        [lion] = chain._lions()
        ranks = torch.distributed.get_world_size()
        if len(steps) == BAD_STEP and torch.distributed.get_rank() == ranks - 1:
            params = (param for group in lion.param_groups for param in group["params"])
            next(param.grad for param in params if param.grad is not None)._local_tensor.view(-1)[0] = torch.nan
        before = local_copies(lion)
        result = stock(chain)
        is_same = all(map(torch.equal, before, local_copies(lion)))
        found: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(found, (bool(result[0]), is_same))
        if torch.distributed.get_rank() == 0:
            applied, same = zip(*found, strict=True)
            print(f"CASE step {len(steps)}: applied on {sum(applied)}, unchanged on {sum(same)}", flush=True)
        return result

    LionChainedOptimizer.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    watch_steps()
    pretrain_gpt.main()
