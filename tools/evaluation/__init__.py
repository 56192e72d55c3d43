"""Modules shared by the tools that read trained checkpoints: finding and reading them, windows, scores."""
