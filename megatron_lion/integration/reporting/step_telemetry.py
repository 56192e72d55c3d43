"""``--lion-telemetry``: statistics of each logged step of Lion, accumulated inside the step's pass over memory.

At every ``--log-interval`` one more line of the log, and TensorBoard and Weights & Biases where they are on: l1 and l2
of the clipped gradient, the share of elements with direction zero and of those with a direction that this gradient
reversed, the agreement sum sign(c) g / l1, and the largest parameter (:mod:`megatron_lion.telemetry`). Every element is
counted on one rank (:mod:`megatron_lion.integration.reporting.gradient_shards`). Steps between are not
measured and cost nothing.
"""

import argparse
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat, console
from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.integration.reporting import gradient_shards, metrics
from megatron_lion.telemetry import Telemetry

SUMS = ("elements", "l1", "l2_squared", "inner", "zeros", "flipped")
METRICS = ("l1", "l2", "zero_share", "flipped_share", "agreement", "linf_param")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flag to Megatron's parser."""
    parser.add_argument(
        "--lion-telemetry",
        action="store_true",
        help="At each --log-interval also log, from inside Lion's step: l1 and l2 of the clipped gradient, the shares "
        "of zero and of flipped signs, the update's agreement with the gradient, and the largest parameter.",
    )


def check(args: Any) -> None:
    """Raise LionError if the optimizer is not Lion."""
    if getattr(args, "lion_telemetry", False) and args.optimizer != "lion":
        raise LionError(f"--lion-telemetry needs --optimizer lion, and this run has {args.optimizer}: remove the flag")


class StepTelemetry:
    """Measures and reports every ``interval``-th step of one optimizer, starting with the next one.

    Args:
        optimizer: Megatron's optimizer around Lion. Each Lion in it is told which of its parameters this rank counts.
        interval: number of steps from one report to the next, at least 1.
        write: receives the values of each report.
    """

    def __init__(self, optimizer: Any, interval: int, write: metrics.Write) -> None:
        self.optimizer, self.interval, self.write = optimizer, interval, write
        self._lions = []
        for sub_optimizer in compat.sub_optimizers_of(optimizer):
            if isinstance(sub_optimizer.optimizer, ShardedLion):
                self._lions.append(sub_optimizer.optimizer)
                sub_optimizer.optimizer.counted = {
                    inner
                    for param, inner, _ in compat.updated_params(sub_optimizer)
                    if gradient_shards.counts_here(sub_optimizer, param)
                }
        self._measure_next_step(True)

    def after_step(self, iteration: int) -> None:
        """Report the step that was number ``iteration`` if it is due, and measure the next one if that is.

        Issues two small all-reduces over all ranks for a report.
        """
        if iteration % self.interval == 0:
            report(over_ranks(self._lions), iteration, self.write)
        self._measure_next_step((iteration + 1) % self.interval == 0)

    def _measure_next_step(self, wanted: bool) -> None:
        for lion in self._lions:
            lion.telemetry = Telemetry() if wanted else None


_current: StepTelemetry | None = None


def before_step(step: Step, iteration: int) -> None:
    """In Megatron's loop: measure the first step of an optimizer."""
    global _current
    from megatron.training import get_args

    args = get_args()
    if args.lion_telemetry and (_current is None or _current.optimizer is not step.optimizer):
        _current = StepTelemetry(step.optimizer, args.log_interval, metrics.write)


def after_step(optimizer: Any, iteration: int) -> None:
    """In Megatron's loop: report a step that was measured."""
    if _current is not None:
        _current.after_step(iteration)


def over_ranks(lions: list[ShardedLion]) -> Telemetry:
    """The sums of the last step over all ranks. Issues two small all-reduces over all ranks."""
    here = Telemetry()
    for lion in lions:
        here.merge(lion.telemetry or Telemetry())
    device = torch.cuda.current_device()
    sums = torch.tensor([float(getattr(here, name)) for name in SUMS], dtype=torch.float64, device=device)
    largest = torch.tensor([here.linf_param], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    values = {name: type(getattr(here, name))(value) for name, value in zip(SUMS, sums.tolist(), strict=True)}
    return Telemetry(**values, linf_param=largest.item())


def report(total: Telemetry, iteration: int, write: metrics.Write) -> None:
    """Log one line on rank 0, and pass the values to ``write``."""
    if total.elements == 0:
        console.say(f"step {iteration}: no update was made")
        return
    console.say(
        f"step {iteration}: gradient l1 {total.l1:.6g}, l2 {total.l2:.6g}, zero signs {total.zero_share:.3%}, flipped "
        f"{total.flipped_share:.3%}, agreement {total.agreement:.4f}, max |theta| {total.linf_param:.6g} "
        f"({total.elements} elements)"
    )
    write({f"lion/{name}": getattr(total, name) for name in METRICS}, iteration)
