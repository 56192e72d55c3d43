"""``--lion-gather signs``: gather what a step changed instead of the parameters (docs/exchange.md).

- :mod:`~megatron_lion.integration.exchange.sign_gather`: what the distributed optimizer does before and after a step.
- :mod:`~megatron_lion.integration.exchange.bucket_groups`: Megatron's bucket groups with another ``start_param_sync``.
- :mod:`~megatron_lion.integration.exchange.bucket_signs`: digits, message and replay of one bucket.
- :mod:`~megatron_lion.integration.exchange.refusals`: what it is not supported with.
- :mod:`~megatron_lion.integration.exchange.metrics`: the log line, TensorBoard and Weights & Biases.
"""
