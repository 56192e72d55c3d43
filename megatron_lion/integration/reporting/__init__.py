"""Per-step telemetry and norm-ratio rounds during training."""
