"""Tests; those of real Megatron run it on gloo ranks (``harness.py``)."""
