"""The process that checks a kernel: ``python -m megatron_lion.kernels.self_check JSON``.

JSON has ``device``, ``kind`` (a dtype's name or null per role), ``numel``, ``telemetry`` (whether to check it too) and
``kernel`` ("module:function"). Prints one line of JSON: ``difference`` (null if there is none), ``elements`` and
``seconds``. A kernel that crashes ends only this process.
"""

import argparse
import importlib
import json
import time

import torch

from megatron_lion.kernels.self_check import problem
from megatron_lion.step import StepKind


def main() -> None:
    """Check the kernel that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m megatron_lion.kernels.self_check", description=__doc__)
    parser.add_argument("asked", type=json.loads, metavar="JSON", help="what to check")
    asked = parser.parse_args().asked
    device = torch.device(asked["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind = StepKind(device, **{role: name and getattr(torch, name) for role, name in asked["kind"].items()})
    start = time.perf_counter()
    module, _, name = asked["kernel"].partition(":")
    update = getattr(importlib.import_module(module), name)
    difference = problem.first_difference(update, kind, asked["numel"], telemetry=asked["telemetry"])
    answer = {
        "difference": difference,
        "elements": problem.elements(asked["numel"]),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
