"""The only place that knows Megatron's versions and private names.

- ``versions``: which versions there are, which one is installed, and in what it differs from the newest.
- ``seams``: names in Megatron that this package calls or relies on.
- ``patching``: how a name is replaced, for good or during one call. Each replacement declares how the name must look.
- ``overriding``: the mark on each method of ours that overrides one of Megatron's.
  All of these are checked before anything is replaced, so that another Megatron is refused by name, never half-patched.
- ``private``: private names, behind functions that say what they are used for.
- ``sharding``: the distributed optimizer of 0.19, also where Megatron is older.
- ``loop``: Megatron's own loop, asked for as each version wants to be.
"""

from megatron_lion.integration.compat.internals import (
    WHEEL_WITHOUT_MAKEFILE,
    folding_the_clip_factor,
    forked_random_states,
    gather_in_forward_again,
    gather_parameters,
    gradient_of,
    has_te_or_apex,
    is_precision_aware,
    is_quantized,
    moe_metrics_kept,
    offloading_with,
    params_outside_the_norm,
    rerun_disabled,
    set_precision_aware,
    shard_range,
    sub_optimizers_of,
    updated_params,
    without_step,
)
from megatron_lion.integration.compat.overriding import overrides
from megatron_lion.integration.compat.patching import Patch, replace_everywhere, temporarily, wrap
from megatron_lion.integration.compat.seams import Seam, require, seams_of
from megatron_lion.integration.compat.versions import (
    has_training,
    installed_traits,
    megatron_path,
    megatron_version,
    require_supported_version,
)

__all__ = [
    "WHEEL_WITHOUT_MAKEFILE",
    "Patch",
    "Seam",
    "folding_the_clip_factor",
    "forked_random_states",
    "gather_in_forward_again",
    "gather_parameters",
    "gradient_of",
    "has_te_or_apex",
    "has_training",
    "installed_traits",
    "is_precision_aware",
    "is_quantized",
    "megatron_path",
    "megatron_version",
    "moe_metrics_kept",
    "offloading_with",
    "overrides",
    "params_outside_the_norm",
    "replace_everywhere",
    "require",
    "require_supported_version",
    "rerun_disabled",
    "seams_of",
    "set_precision_aware",
    "shard_range",
    "sub_optimizers_of",
    "temporarily",
    "updated_params",
    "without_step",
    "wrap",
]
