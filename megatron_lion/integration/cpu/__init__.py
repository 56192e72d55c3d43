"""Megatron without a GPU: opt-in, never active where there is one."""
