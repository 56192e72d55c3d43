"""Everything that knows Megatron. Only :mod:`.compat` knows its versions and private names."""
