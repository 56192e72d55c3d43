"""Scripts that start training, and the launcher of recipes."""
