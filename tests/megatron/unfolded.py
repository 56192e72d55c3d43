"""Run under torchrun in the place of ``pretrain_gpt.py``: WHAT is ``folded``, as it is, or ``unfolded``, where Megatron
scales the gradients and copies the parameters itself. Says on each rank how often Lion took that over, and which module
computes Megatron's gradient norm.
"""

import sys

import megatron_lion

megatron_lion.register()

from megatron.core.optimizer import clip_grads  # noqa: E402

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer  # noqa: E402
from megatron_lion.integration.optimizer.distributed import LionDistributedOptimizer  # noqa: E402


def main() -> None:
    folded = sys.argv.pop(1) == "folded"
    taken = {"clip": 0, "copy": 0}
    fold, let_copy = LionChainedOptimizer._fold, LionDistributedOptimizer._let_lion_copy

    def counted_fold(self, parameters, factor):
        done = folded and fold(self, parameters, factor)
        taken["clip"] += done and bool(factor < 1.0)
        return done

    def counted_copy(self):
        done = folded and let_copy(self)
        taken["copy"] += done
        return done

    LionChainedOptimizer._fold, LionDistributedOptimizer._let_lion_copy = counted_fold, counted_copy
    pretrain_gpt.main()
    print(f"taken over: clip {taken['clip']}, copy {taken['copy']}", flush=True)
    print(f"norm by {clip_grads.l2_norm_impl.__module__}", flush=True)


if __name__ == "__main__":
    main()
