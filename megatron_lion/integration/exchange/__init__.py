"""What data-parallel ranks send each other instead of parameters and gradients (docs/exchange.md).

``--lion-gather signs``, after a step:

- :mod:`~megatron_lion.integration.exchange.sign_gather`: what the distributed optimizer does before and after a step.
- :mod:`~megatron_lion.integration.exchange.bucket_groups`: Megatron's bucket groups with another ``start_param_sync``.
- :mod:`~megatron_lion.integration.exchange.bucket_signs`: digits, message and replay of one bucket.
- :mod:`~megatron_lion.integration.exchange.metrics`: the log line, TensorBoard and Weights & Biases.

``--lion-reduce``, before a step:

- :mod:`~megatron_lion.integration.exchange.block_reduce`: what is kept from step to step, and at a save.
- :mod:`~megatron_lion.integration.exchange.reducing_groups`: Megatron's bucket groups with another ``start_grad_sync``.
- :mod:`~megatron_lion.integration.exchange.bucket_reduction`: messages and sum of one bucket.
- :mod:`~megatron_lion.integration.exchange.reduce_metrics`: the log line, TensorBoard and Weights & Biases.

Both:

- :mod:`~megatron_lion.integration.exchange.groups`: bucket groups and parameters of one optimizer.
- :mod:`~megatron_lion.integration.exchange.refusals`: what they are not supported with.
"""
