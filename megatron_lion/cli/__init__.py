"""The ``megatron-lion`` command."""
