"""What the studies share: real Megatron runs on this machine, their records, and how their figures look."""
