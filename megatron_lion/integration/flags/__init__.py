"""Command-line flags on Megatron's own parser, and their checks."""
