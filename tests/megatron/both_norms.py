"""Run under torchrun in the place of ``pretrain_gpt.py``: at each step, rank 0 prints the norm that the run uses, the
one that Megatron computes by itself, and the one in fp64, all of the same gradients.
"""

import torch

import megatron_lion

megatron_lion.register()

from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration import compat  # noqa: E402
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer  # noqa: E402


def in_fp64(grads):
    return torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().float().view(1)


def main() -> None:
    used = LionChainedOptimizer.get_grad_norm

    def both(self):
        norm, megatrons = used(self), ChainedOptimizer.get_grad_norm(self)
        with compat.gradient_norm_by(in_fp64):
            exact = ChainedOptimizer.get_grad_norm(self)
        if torch.distributed.get_rank() == 0:
            print(f"norms {float(norm).hex()} {float(megatrons).hex()} {float(exact).hex()}", flush=True)
        return norm

    LionChainedOptimizer.get_grad_norm = both
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
