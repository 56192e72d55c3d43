"""Modules of tools/benchmark/step.py: shapes, bytes that each step reads and writes, peers, and tables."""
