"""Compression of what data-parallel ranks send each other: pure functions on tensors, without collectives.

The parameters after a step, exact:

- :mod:`~megatron_lion.exchange.trits`: five trits in a byte.
- :mod:`~megatron_lion.exchange.digits`: what the receivers of a parameter need to know about a step.
- :mod:`~megatron_lion.exchange.message`: the message of one shard, and its replay.

Gradients, lossy:

- :mod:`~megatron_lion.exchange.blocks`: 64 elements with one scale, and what they leave out.
- :mod:`~megatron_lion.exchange.pieces`: the message to the owner of a shard, and the sum of messages.

The modules are the reference implementation. The kernels in :mod:`megatron_lion.kernels.exchange` and
:mod:`megatron_lion.kernels.reduce` match it bit for bit.
"""
