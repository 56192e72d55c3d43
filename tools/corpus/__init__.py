"""What the tools that read and write training text share: sources, tokenizers, splits, shards, manifests."""
