"""In the place of Apex's extension."""

from tests.stand_ins.extensions import l2norm as multi_tensor_l2norm
from tests.stand_ins.extensions import scale as multi_tensor_scale

__all__ = ["multi_tensor_l2norm", "multi_tensor_scale"]
