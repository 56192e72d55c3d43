"""Compare the time of a norm-ratio round with that of as many forward and backward passes, inside Megatron's loop.

Use the command line of the run that you have in mind, with --train-iters 2. After the first step it measures, in turns,
a round of --norm-ratio-batches batches (10 unless given) and as many forward and backward passes with gradient
reduction as training makes them, on the same samples through the same loader. It makes BENCHMARK_PAIRS (12) pairs, half
of them in the other order, and prints the medians and the median of the ratios.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import megatron_lion
from launch import pretrain_gpt
from megatron_lion.config import LionError
from megatron_lion.integration import console
from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.reporting.norm_ratio.isolation import isolated
from megatron_lion.integration.reporting.norm_ratio.loop_round import drawn, forward_backward, own_iterator, run_round
from megatron_lion.integration.reporting.norm_ratio.schedule import Rounds
from megatron_lion.run import readable_errors

USAGE = "torchrun --nproc-per-node 2 -m tools.benchmark.norm_ratio_round --optimizer lion --lr 1e-4 <Megatron's flags>"
PAIRS = int(os.environ.get("BENCHMARK_PAIRS", "12"))


def passes(step: Step, datasets: list[Any], batches: int) -> None:
    """As many forward and backward passes as a round makes, and nothing else."""
    iterator = own_iterator(step, datasets, drawn(datasets, batches, iteration=0), iteration=0)
    for _ in range(batches):
        for chunk in step.model:
            chunk.zero_grad_buffer()
        forward_backward(step, step.forward_step_func, iterator)


def one_round(step: Step, datasets: list[Any], batches: int) -> None:
    """The round itself."""
    run_round(step, datasets, batches, iteration=0)


def seconds(work: Callable[..., None], *args: Any) -> float:
    """Seconds of ``work(*args)`` until all ranks have ended it."""
    torch.distributed.barrier()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work(*args)
    torch.distributed.barrier()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def benchmark(rounds: Rounds, batches: int) -> None:
    """Measure the pairs and print the result."""
    step = rounds.step
    assert step is not None
    times: dict[Callable[..., None], list[float]] = {one_round: [], passes: []}
    with isolated(step.model, step.optimizer, step.config, stepped=True):
        for work in times:
            seconds(work, step, rounds.datasets, batches)  # warm-up
        for pair in range(PAIRS):
            for work in times if pair % 2 == 0 else reversed(times):
                times[work].append(seconds(work, step, rounds.datasets, batches))
    round_seconds, passes_seconds = times[one_round], times[passes]
    ratios = [one / other for one, other in zip(round_seconds, passes_seconds, strict=True)]
    console.say(
        f"a round of {batches} batches takes {statistics.median(round_seconds):.3f} s, {batches} forward and backward "
        f"passes {statistics.median(passes_seconds):.3f} s: median ratio of {PAIRS} pairs "
        f"{statistics.median(ratios):.4f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


def main() -> None:
    """Train one step, then measure."""
    if {"-h", "--help"} & set(sys.argv):
        print(f"usage: {USAGE}\n\n{__doc__}\nAll of Megatron's flags: python launch/pretrain_gpt.py --help")
        return
    if "--norm-ratio-interval" in sys.argv or "--norm-ratio-at-start" in sys.argv:
        raise LionError("the benchmark starts its rounds by itself: leave out --norm-ratio-interval and -at-start")
    sys.argv += ["--norm-ratio-interval", "1", "--norm-ratio-file", os.devnull]
    if "--norm-ratio-batches" not in sys.argv:
        sys.argv += ["--norm-ratio-batches", "10"]

    def measure(self: Rounds, config: Any, iteration: int, *, stepped: bool) -> None:
        if iteration == 1:
            benchmark(self, config.batches)

    Rounds.measure = measure  # type: ignore[method-assign]
    megatron_lion.register()
    pretrain_gpt.main()


if __name__ == "__main__":
    with readable_errors():
        main()
