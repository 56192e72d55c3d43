"""Norm-ratio rounds in Megatron's loop: ``schedule`` decides when a round is due, ``measure`` runs it."""
