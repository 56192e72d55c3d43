"""Host time of a Lion step on a GPU, measured without one.

    python -m tools.benchmark.host [--tensors 148 600 3000] [--steps 30]

A GPU waits for the host where the host takes longer to launch a step than the GPU takes to run it. Triton compiles and
binds arguments as always; its driver records launches and makes none. Times are CPU time of one thread, the least and
the median of the steps. The table on the device is built on the CPU here, in the first step only.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from tools.benchmark.fake_gpu import RecordingDriver  # before Triton's kernels are defined  # isort: skip

import torch

from megatron_lion import kernels
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.kernels.triton_lion import lion_update_triton_

ELEMENTS = 64  # of a tensor: launches are not made, so the number does not matter
Params = list[torch.nn.Parameter]


def fp32(tensors: int) -> tuple[ShardedLion, Params]:
    """fp32 parameters and gradients that stay the same tensors."""
    params = [torch.nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.zeros(ELEMENTS)
    return ShardedLion(params, lr=1e-4), params


def compact(tensors: int) -> tuple[ShardedLion, Params]:
    """bf16 parameters with remainders, int8 momentum and fp32 gradients: the most tensors per parameter."""
    params = [torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.bfloat16)) for _ in range(tensors)]
    lion = ShardedLion(params, lr=1e-4, momentum_dtype="int8", master_weights="remainder")
    lion.use_decoupled_grad = True
    for param in params:
        param.decoupled_grad = torch.zeros(ELEMENTS)
    return lion, params


def new_views(params: Params) -> None:
    """Give each parameter its gradient as a new tensor at the same address, as Megatron does in each step."""
    for param in params:
        if param.grad is not None:
            param.grad = param.grad.view(-1)
        else:
            param.decoupled_grad = param.decoupled_grad.view(-1)


def moved(params: Params) -> None:
    """Give each parameter its gradient at another address, as ``zero_grad(set_to_none=True)`` may."""
    for param in params:
        param.grad = torch.zeros(ELEMENTS)


CASES: dict[str, tuple[Callable[[int], tuple[ShardedLion, Params]], Callable[[Params], None]]] = {
    "fp32": (fp32, lambda params: None),
    "fp32, gradients are new views": (fp32, new_views),
    "fp32, gradients move": (fp32, moved),
    "remainder, int8, gradients are new views": (compact, new_views),
}


def milliseconds(lion: ShardedLion, params: Params, before: Callable[[Params], None], steps: int) -> list[float]:
    """CPU time of each step after the first two."""
    times = []
    for _ in range(steps + 2):
        before(params)
        start = time.thread_time()
        lion.step()
        times.append(1e3 * (time.thread_time() - start))
    return times[2:]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tensors", nargs="+", type=int, default=[148, 600, 3000], help="numbers of tensors (default: 148 600 3000)"
    )
    parser.add_argument("--steps", type=int, default=30, help="steps per row (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gpu = RecordingDriver().install()
    kernels.choose = lambda *_, **__: lion_update_triton_  # type: ignore[assignment]
    print("| | tensors | ms, least | ms, median | launches per step |\n|---|---|---|---|---|")
    for name, (make, before) in CASES.items():
        for tensors in args.tensors:
            lion, params = make(tensors)
            lion.step()
            gpu.launches.clear()
            times = milliseconds(lion, params, before, args.steps)
            launches = len(gpu.launches) / (args.steps + 2)
            print(
                f"| {name} | {tensors} | {min(times):.2f} | {statistics.median(times):.2f} | {launches:g} |", flush=True
            )


if __name__ == "__main__":
    main()
