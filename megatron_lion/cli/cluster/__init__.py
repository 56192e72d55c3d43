"""``megatron-lion doctor --cluster``: compare the ranks of a launcher with each other before a run."""
