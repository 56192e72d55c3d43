"""Entry points to Megatron's training loop for the scripts in launch/."""
