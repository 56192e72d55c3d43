"""Faster versions of :func:`megatron_lion.update.lion_update_`, equal to it bit for bit, and the choice among them."""

from collections.abc import Sequence

from torch import Tensor

from megatron_lion.kernels.foreach import foreach_supports, lion_update_foreach_
from megatron_lion.update import LionUpdate, lion_update_

KERNELS = ("auto", "reference", "foreach")


def choose(kernel: str, params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> LionUpdate:
    """The update function to call on these tensors.

    ``"auto"`` takes foreach where :func:`foreach_supports` says that it applies, else the reference; the two named
    kernels are taken as asked, foreach falling back to the reference for tensors of mixed dtypes or devices.
    """
    if kernel != "reference" and foreach_supports(params, grads, exp_avgs):
        return lion_update_foreach_
    return lion_update_
