"""Run in the place of ``pretrain_gpt.py``: Megatron repeats a step to find out why its loss is wrong.

    torchrun tests/megatron/repeated.py <Megatron's flags>

With REPEAT=nan the last rank's loss of step 3 is NaN, each time: Megatron saves and exits. With REPEAT=spike Megatron
only finds that loss unusual, as --check-for-spiky-loss does. It repeats the step and continues.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

import megatron_lion

megatron_lion.register()

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402
from megatron.training import get_args  # noqa: E402

STEPS_BEFORE = 2


def with_fault(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a model chunk, with the fault that REPEAT asks for."""

    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if not torch.is_grad_enabled() or getattr(get_args(), "curr_iteration", 0) != STEPS_BEFORE:
            return output
        if os.environ["REPEAT"] == "nan":
            is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
            return output * float("nan") if is_last else output
        get_rerun_state_machine().validate_result(
            result=output.sum().detach(), rejection_func=lambda _: True, message="spike", tolerance=0.0, fatal=False
        )
        return output

    return faulty


if __name__ == "__main__":
    DistributedDataParallel.forward = with_fault(DistributedDataParallel.forward)  # type: ignore[method-assign]
    from launch import pretrain_gpt

    pretrain_gpt.main()
