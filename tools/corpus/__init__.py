"""Modules shared by the tools that read and write training text: sources, tokenizers, splits, shards, manifests."""
