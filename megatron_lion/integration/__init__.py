"""Everything that knows Megatron. Differences between its releases are in :mod:`.compat`."""
