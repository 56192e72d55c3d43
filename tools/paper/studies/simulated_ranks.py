"""Run in the place of ``pretrain_gpt.py`` on one rank: its micro-batches stand for data-parallel ranks.

    python tools/paper/studies/simulated_ranks.py ARM <Megatron's flags>

The gradient of each micro-batch is packed, sent to the owners of its shards and summed there by the code of
``--lion-reduce``, in one process. So a run with k micro-batches in a step learns what a run on k ranks would, and with
the same bits where no clip factor depends on the order of a sum. ARM is one of ``ARMS``.
"""

import argparse
import sys
from typing import Any

import megatron_lion

megatron_lion.register()

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup  # noqa: E402
from megatron.core.pipeline_parallel import schedules  # noqa: E402
from torch import Tensor  # noqa: E402

from launch import pretrain_gpt  # noqa: E402
from tools.paper.studies.reduce_arms import ARMS, Reduce  # noqa: E402

FLAGS = {"vote": "--lion-beta1 0 --clip-grad 0"}  # of Megatron, after the run's own


def simulate(reduce: Reduce) -> None:
    """Keep the gradient of each micro-batch by itself, and let ``reduce`` sum them where Megatron would send them."""
    kept: dict[int, list[Tensor]] = {}
    buckets: dict[int, Any] = {}
    stack: list[None] = []
    init, backward = _ParamAndGradBucketGroup.__init__, schedules.backward_step
    start = _ParamAndGradBucketGroup.start_grad_sync

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        buckets.update((id(bucket), bucket) for bucket in self.buckets)

    def keep_apart(*arguments: Any, **options: Any) -> Any:
        stack.append(None)
        result = backward(*arguments, **options)
        stack.pop()
        if not stack:  # once for each micro-batch
            for key, bucket in buckets.items():
                kept.setdefault(key, []).append(bucket.grad_data.clone())
                bucket.grad_data.zero_()
        return result

    def reduced(self: Any, *arguments: Any, **options: Any) -> None:
        for bucket in self.buckets:
            bucket.grad_data.copy_(reduce(bucket, kept.pop(id(bucket))))
        start(self, *arguments, **options)

    _ParamAndGradBucketGroup.__init__ = noted
    schedules.backward_step = keep_apart
    _ParamAndGradBucketGroup.start_grad_sync = reduced


def main() -> None:
    """Train one arm. What follows its name is for Megatron."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=ARMS, help="how gradients are reduced")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="Megatron's flags")
    options = parser.parse_args()
    sys.argv[1:] = [*options.flags, *FLAGS.get(options.arm, "").split()]
    simulate(ARMS[options.arm]())
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
