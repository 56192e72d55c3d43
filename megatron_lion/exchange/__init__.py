"""Exact compression of what data-parallel ranks send each other: pure functions on tensors, without collectives.

- :mod:`~megatron_lion.exchange.trits`: five trits in a byte.
- :mod:`~megatron_lion.exchange.digits`: what the receivers of a parameter need to know about a step.
- :mod:`~megatron_lion.exchange.message`: the message of one shard, and its replay.

The modules are the reference implementation. The kernels in :mod:`megatron_lion.kernels.exchange` match it bit for bit.
"""
