"""Functions to call before and after each step of Megatron's training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lion.integration import compat


@dataclass(frozen=True)
class Step:
    """The arguments of a training step in Megatron's loop."""

    forward_step_func: Callable[..., Any]
    data_iterator: Any
    model: list[Any]
    optimizer: Any
    config: Any
    forward_backward_func: Callable[..., Any]
    schedule_options: dict[str, Any]


# Called in this order, on every rank: with the step that begins and the number of steps done so far; and with the
# optimizer and the number of steps done.
before_step: list[Callable[[Step, int], None]] = []
after_step: list[Callable[[Any, int], None]] = []


def train_step(
    stock: Callable[..., Any],
    forward_step_func: Any,
    data_iterator: Any,
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    config: Any,
    forward_backward_func: Any,
    iteration: int | None = None,
    **kwargs: Any,
) -> Any:
    """Run the callbacks, then the step."""
    step = Step(forward_step_func, data_iterator, model, optimizer, config, forward_backward_func, kwargs)
    for callback in before_step:
        callback(step, iteration or 0)
    return stock(
        forward_step_func,
        data_iterator,
        model,
        optimizer,
        opt_param_scheduler,
        config,
        forward_backward_func,
        iteration=iteration,
        **kwargs,
    )


def post_training_step_callbacks(
    stock: Callable[..., Any],
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the callbacks, which come between a step's log line and its checkpoint, then Megatron's own."""
    for callback in after_step:
        callback(optimizer, iteration)
    return stock(model, optimizer, opt_param_scheduler, iteration, *args, **kwargs)


TRAINING = (
    compat.wrap(
        "megatron.training.training:train_step",
        train_step,
        parameters=(
            "forward_step_func",
            "data_iterator",
            "model",
            "optimizer",
            "opt_param_scheduler",
            "config",
            "forward_backward_func",
            "iteration",
        ),
    ),
    compat.wrap(
        "megatron.training.training:post_training_step_callbacks",
        post_training_step_callbacks,
        parameters=("model", "optimizer", "opt_param_scheduler", "iteration"),
    ),
)
