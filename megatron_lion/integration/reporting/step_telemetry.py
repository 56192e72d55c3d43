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


def before_step(step: Step, iteration: int) -> None:
    """Measure the first step."""
    from megatron.training import get_args

    if get_args().lion_telemetry and any(lion.counted is None for lion in _lions(step.optimizer)):
        begin(step.optimizer)
        measure_next_step(step.optimizer, True)


def after_step(optimizer: Any, iteration: int) -> None:
    """Report a step that was measured, and measure the next one if its log line is due."""
    from megatron.training import get_args

    if get_args().lion_telemetry:
        interval = get_args().log_interval
        if iteration % interval == 0:
            report(over_ranks(_lions(optimizer)), iteration)
        measure_next_step(optimizer, (iteration + 1) % interval == 0)


def begin(optimizer: Any) -> None:
    """Tell each Lion which of its parameters this rank counts."""
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if isinstance(sub_optimizer.optimizer, ShardedLion):
            sub_optimizer.optimizer.counted = {
                inner
                for param, inner, _ in compat.updated_params(sub_optimizer)
                if gradient_shards.counts_here(sub_optimizer, param)
            }


def measure_next_step(optimizer: Any, wanted: bool) -> None:
    """Have the next step of each Lion add to fresh sums, or to none."""
    for lion in _lions(optimizer):
        lion.telemetry = Telemetry() if wanted else None


def _lions(optimizer: Any) -> list[ShardedLion]:
    return [
        sub_optimizer.optimizer
        for sub_optimizer in compat.sub_optimizers_of(optimizer)
        if isinstance(sub_optimizer.optimizer, ShardedLion)
    ]


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


def report(total: Telemetry, iteration: int) -> None:
    """One line on rank 0, and TensorBoard and Weights & Biases where they are on."""
    if total.elements == 0:
        console.say(f"step {iteration}: no update was made")
        return
    console.say(
        f"step {iteration}: gradient l1 {total.l1:.6g}, l2 {total.l2:.6g}, zero signs {total.zero_share:.3%}, flipped "
        f"{total.flipped_share:.3%}, agreement {total.agreement:.4f}, max |theta| {total.linf_param:.6g} "
        f"({total.elements} elements)"
    )
    metrics.write({f"lion/{name}": getattr(total, name) for name in METRICS}, iteration)
