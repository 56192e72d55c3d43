"""Values for TensorBoard and Weights & Biases."""

from collections.abc import Callable

# Writes named values of an iteration. Called on every rank.
Write = Callable[[dict[str, float], int], None]


def write(values: dict[str, float], iteration: int) -> None:
    """Write ``values`` where Megatron has a writer: on one rank, to those of the two that are on."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(values, iteration)


def write_nowhere(values: dict[str, float], iteration: int) -> None:
    """For a loop without a writer: the lines of the log are all there is."""
