"""The paper's instrument inside Megatron's loop: ``rounds`` says when a round is due, ``round`` is one."""
