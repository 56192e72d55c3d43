"""``--lion-telemetry``: what each logged step of Lion did, summed inside the step's own pass over memory.

At every ``--log-interval`` one more line of the log, and TensorBoard and Weights & Biases where they are on: l1 and l2
of the clipped gradient, the share of elements whose direction is zero and of those whose direction this gradient turned
round, the agreement sum sign(c) g / l1, and the largest parameter (:mod:`megatron_lion.telemetry`). Every element is
counted on one rank (:mod:`megatron_lion.integration.reporting.gradient_shards`). Steps between are not
measured and cost nothing.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat, console
from megatron_lion.integration.reporting import gradient_shards
from megatron_lion.lion import Lion
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
    """Raise LionError where there is no Lion to tell anything."""
    if getattr(args, "lion_telemetry", False) and args.optimizer != "lion":
        raise LionError(f"--lion-telemetry is Lion's, and this run's optimizer is {args.optimizer}: drop the flag")


def train_step(
    stock: Callable[..., Any],
    forward_step_func: Any,
    data_iterator: Any,
    model: Any,
    optimizer: Any,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Measure the first step."""
    from megatron.training import get_args

    if get_args().lion_telemetry and any(lion.counted is None for lion in _lions(optimizer)):
        begin(optimizer)
        measure_next_step(optimizer, True)
    return stock(forward_step_func, data_iterator, model, optimizer, *rest, **kwargs)


def post_training_step_callbacks(
    stock: Callable[..., Any],
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Report a step that was measured, and measure the next one whose log line is due."""
    from megatron.training import get_args

    if get_args().lion_telemetry:
        interval = get_args().log_interval
        if iteration % interval == 0:
            report(over_ranks(_lions(optimizer)), iteration)
        measure_next_step(optimizer, (iteration + 1) % interval == 0)
    return stock(model, optimizer, opt_param_scheduler, iteration, *args, **kwargs)


TRAINING = (
    compat.wrap(
        "megatron.training.training:train_step",
        train_step,
        parameters=("forward_step_func", "data_iterator", "model", "optimizer"),
    ),
    compat.wrap(
        "megatron.training.training:post_training_step_callbacks",
        post_training_step_callbacks,
        parameters=("model", "optimizer", "opt_param_scheduler", "iteration"),
    ),
)


def begin(optimizer: Any) -> None:
    """Tell each Lion which of its parameters this rank counts."""
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if isinstance(sub_optimizer.optimizer, Lion):
            sub_optimizer.optimizer.counted = {
                inner
                for param, inner, _ in compat.updated_params(sub_optimizer)
                if gradient_shards.counts_here(sub_optimizer, param)
            }


def measure_next_step(optimizer: Any, wanted: bool) -> None:
    """Have the next step of each Lion add to fresh sums, or to none."""
    for lion in _lions(optimizer):
        lion.telemetry = Telemetry() if wanted else None


def _lions(optimizer: Any) -> list[Lion]:
    return [
        sub_optimizer.optimizer
        for sub_optimizer in compat.sub_optimizers_of(optimizer)
        if isinstance(sub_optimizer.optimizer, Lion)
    ]


def over_ranks(lions: list[Lion]) -> Telemetry:
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
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if total.elements == 0:
        console.say(f"step {iteration}: no update was made")
        return
    console.say(
        f"step {iteration}: gradient l1 {total.l1:.6g}, l2 {total.l2:.6g}, zero signs {total.zero_share:.3%}, flipped "
        f"{total.flipped_share:.3%}, agreement {total.agreement:.4f}, max |theta| {total.linf_param:.6g} "
        f"({total.elements} elements)"
    )
    values = {f"lion/{name}": getattr(total, name) for name in METRICS}
    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(values, iteration)
