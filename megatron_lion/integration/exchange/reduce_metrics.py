"""At every ``--log-interval``: what ``--lion-reduce`` sent and kept, in the log, TensorBoard and W&B.

The step that is logged is sampled: norms of the gradient and of the residual, and with ``--lion-telemetry`` the share
of signs that the uncompressed gradient would change, which costs one more reduction in that step.
"""

from typing import Any

import torch

from megatron_lion.config import LionOptions
from megatron_lion.integration import console
from megatron_lion.integration.exchange.block_reduce import BlockReduce, reduces_of
from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.reporting import metrics


class ReduceTelemetry:
    """Samples and reports every ``interval``-th step of one optimizer, signs included, for a loop of another script.

    Args:
        optimizer: Megatron's optimizer around Lion.
        interval: number of steps from one report to the next, at least 1.
        write: receives the values of each report.
        iteration: number of steps that were made before.
    """

    def __init__(self, optimizer: Any, interval: int, write: metrics.Write, *, iteration: int = 0) -> None:
        self._reduces, self._interval, self._write = reduces_of(optimizer), interval, write
        self._sample_after(iteration)

    def after_step(self, iteration: int) -> None:
        """Report the step that was number ``iteration`` if it is due, and sample the next one if that is.

        Issues one small all-reduce over all ranks for a report.
        """
        if iteration % self._interval == 0:
            report(self._reduces, iteration, self._write)
        self._sample_after(iteration)

    def _sample_after(self, iteration: int) -> None:
        is_due = (iteration + 1) % self._interval == 0
        for reduce in self._reduces:
            reduce.sample_next("exact" if is_due else None)


def before_step(step: Step, iteration: int) -> None:
    """Sample the step that comes after ``iteration`` steps if it will be logged."""
    from megatron.training import get_args

    args = get_args()
    if _is_on(args):
        is_due = (iteration + 1) % args.log_interval == 0
        what = "exact" if args.lion_telemetry else "norm"
        for reduce in reduces_of(step.optimizer):
            reduce.sample_next(what if is_due else None)


def after_step(optimizer: Any, iteration: int) -> None:
    """Report the step if it was sampled."""
    from megatron.training import get_args

    args = get_args()
    if _is_on(args) and iteration % args.log_interval == 0:
        report(reduces_of(optimizer), iteration, metrics.write)


def _is_on(args: Any) -> bool:
    """A script without the project's flags has no ``lion_reduce``."""
    return bool(getattr(args, "lion_reduce", LionOptions.reduce) != LionOptions.reduce)


def report(reduces: list[BlockReduce], iteration: int, write: metrics.Write) -> None:
    """One line on rank 0, and the values for ``write``: sums over all ranks. Issues one small all-reduce over all
    ranks."""
    taken = [reduce.take_sample() for reduce in reduces]
    bits = sum(8 * sum(bucket.sent_sizes) for reduce in reduces for bucket in reduce.buckets)
    elements = sum(bucket.numel * len(bucket.others) for reduce in reduces for bucket in reduce.buckets)
    here = [sum(getattr(sample, name) for sample in taken) for name in ("gradient", "residual", "unlike", "elements")]
    sums = torch.tensor([bits, elements, *here], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(sums)
    bits, elements, gradient, residual, unlike, counted = sums.tolist()
    if not elements or gradient == 0.0:  # DP=1, or Megatron reduced this step itself, as for --save-wgrads-interval
        return
    values = {"reduce_bits": bits / elements}
    line = f"step {iteration}: reduction of gradients: {bits / elements:.2f} bits per parameter"
    if gradient > 0 and residual > 0:  # nothing is kept with feedback "none" and after a skipped step
        values["reduce_residual"] = (residual / gradient) ** 0.5
        line += f", not sent {values['reduce_residual']:.3f} of the gradient's norm"
    if counted:
        values["reduce_unlike_signs"] = unlike / counted
        line += f", {values['reduce_unlike_signs']:.3%} of signs unlike the exact ones"
    console.say(line)
    write({f"lion/{name}": value for name, value in values.items()}, iteration)
