"""Which checkpoints a run may load, what they hold, and whether they are intact."""
