"""``megatron-lion doctor --cluster``: what the ranks of a launcher see of each other, before a run rests on it."""
