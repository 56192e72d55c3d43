"""Run a script for Megatron-Bridge on a CPU, without registration: ``run_snippet.py SCRIPT``."""

import runpy
import sys

from megatron_lion.integration import compat
from megatron_lion.integration.cpu import megatron_patches, torch_cuda
from tests.bridge import stand_ins

if __name__ == "__main__":
    torch_cuda.replace_cuda()
    for patch in (*megatron_patches.CORE, compat.WHEEL_WITHOUT_MAKEFILE):
        if patch.seam.is_needed:
            patch.apply()
    stand_ins.install()
    runpy.run_path(sys.argv[1], run_name="__main__")
