"""What the tools that read trained checkpoints share: finding and reading them, windows, scores."""
