"""Values for TensorBoard and Weights & Biases."""


def write(values: dict[str, float], iteration: int) -> None:
    """Write ``values`` where Megatron has a writer: on one rank, to those of the two that are on."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(values, iteration)
