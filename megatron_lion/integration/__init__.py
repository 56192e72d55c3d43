"""Everything that knows Megatron. Only :mod:`~megatron_lion.integration.compat` knows its versions and private names."""
