"""Imported once by the server that ranks are forked from: what every run would spend ten seconds of each rank on.

Megatron as it is on a machine without a GPU, with nothing of this package registered: that is each run's own first act.
"""

import os

from megatron_lion.integration import cpu_backend

if os.environ.get(cpu_backend.DEVICE_VARIABLE) == "cpu":
    cpu_backend.replace_cuda()


import megatron_lion.integration.register
import megatron_lion.lion  # noqa: F401
