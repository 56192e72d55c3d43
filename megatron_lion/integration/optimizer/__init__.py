"""Megatron's optimizers built around Lion, SGD and torch's Adam."""
