"""Differences between Megatron's releases, and checks of the names in it that this package relies on.

- ``versions``: supported versions, the installed one, and how it differs from the newest.
- ``checks``: compatibility checks. Each ``Seam`` is a name in Megatron that this package calls or relies on.
- ``seams``: the table of these names.
- ``patching``: replaces a name, permanently or during one call. Each replacement declares the seam that it needs.
- ``overriding``: marks each of our methods that overrides one of Megatron's.
  All of these are checked before anything is replaced, so that an unknown Megatron is refused, never half-patched.
- ``internals``: wrappers around Megatron internals.
- ``buckets``: wrappers around its buffers of parameters and gradients.
- ``sharding``: the distributed optimizer of 0.19, for older Megatron too.
"""

from megatron_lion.integration.compat.buckets import (
    finish_reduction_with,
    gather_is_dispatched,
    gather_parameters,
    is_copied_over_tp,
    is_reduced_again,
    range_in_bucket,
    reducing_with,
    shard_range,
    wait_for_gather,
)
from megatron_lion.integration.compat.checks import Seam, require
from megatron_lion.integration.compat.internals import (
    WHEEL_WITHOUT_MAKEFILE,
    as_sgd,
    folding_the_clip_factor,
    forked_random_states,
    fsdp_range,
    gradient_norm_by,
    gradient_of,
    has_te_or_apex,
    is_fsdp_param,
    is_precision_aware,
    is_quantized,
    moe_metrics_kept,
    offloading_with,
    one_epoch_of_sentences,
    original,
    params_outside_the_norm,
    reduces_norm_over_all_ranks,
    rerun_disabled,
    set_precision_aware,
    sub_optimizers_of,
    updated_params,
    uses_megatron_fsdp,
    without_precision_aware_settings,
    without_step,
)
from megatron_lion.integration.compat.overriding import overrides
from megatron_lion.integration.compat.patching import Patch, replace_everywhere, temporarily, wrap
from megatron_lion.integration.compat.seams import GENERATED, seams_of
from megatron_lion.integration.compat.versions import (
    has_training,
    installed_traits,
    megatron_path,
    megatron_version,
    require_supported_version,
    version_at,
)

__all__ = [
    "GENERATED",
    "WHEEL_WITHOUT_MAKEFILE",
    "Patch",
    "Seam",
    "as_sgd",
    "finish_reduction_with",
    "folding_the_clip_factor",
    "forked_random_states",
    "fsdp_range",
    "gather_is_dispatched",
    "gather_parameters",
    "gradient_norm_by",
    "gradient_of",
    "has_te_or_apex",
    "has_training",
    "installed_traits",
    "is_copied_over_tp",
    "is_fsdp_param",
    "is_precision_aware",
    "is_quantized",
    "is_reduced_again",
    "megatron_path",
    "megatron_version",
    "moe_metrics_kept",
    "offloading_with",
    "one_epoch_of_sentences",
    "original",
    "overrides",
    "params_outside_the_norm",
    "range_in_bucket",
    "reduces_norm_over_all_ranks",
    "reducing_with",
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
    "uses_megatron_fsdp",
    "version_at",
    "wait_for_gather",
    "without_precision_aware_settings",
    "without_step",
    "wrap",
]
