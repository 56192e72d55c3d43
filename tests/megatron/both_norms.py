"""Run under torchrun in the place of ``pretrain_gpt.py``: at each step, rank 0 prints the norm that the run uses and
the one that Megatron computes by itself of the same gradients.
"""

import torch

import megatron_lion

megatron_lion.register()

from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer  # noqa: E402


def main() -> None:
    used = LionChainedOptimizer.get_grad_norm

    def both(self):
        norm, megatrons = used(self), ChainedOptimizer.get_grad_norm(self)
        if torch.distributed.get_rank() == 0:
            print(f"norms {float(norm).hex()} {float(megatrons).hex()}", flush=True)
        return norm

    LionChainedOptimizer.get_grad_norm = both
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
