"""One rank of a run, built without its other ranks and without a GPU.

- ``one_rank``: runs the script of a rank up to its first step, or for some steps, and returns a ``RankReport``.
- ``fake_ranks``: torch's fake process group in the place of the other ranks.
- ``local_modules``: what a machine without a GPU lacks, replaced or refused.
- ``sizes``: bytes of weights, gradients and state, and messages of a step, from the objects built.
- ``checkpoint_plan``: what a save writes, and whether ``--load`` fits, from the checkpoint's metadata.
- ``made_up_steps``: steps on random tokens.
- ``step_meter``: memory that a step keeps for its backward pass, and its messages.
"""
