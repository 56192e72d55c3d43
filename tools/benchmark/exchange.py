"""Rates of the exchange's kernels on a CPU: nanoseconds for each parameter, next to a copy of as many bytes.

    python -m tools.benchmark.exchange [--parameters 16000000] [--threads 1] [--exceptions 0.003]

Times are the best of several calls. With one thread they are CPU time, so other jobs on the machine disturb them less.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from megatron_lion.exchange.blocks import CODES, Residual
from megatron_lion.exchange.digits import EXCEPTION, FORMATS
from megatron_lion.exchange.message import Run, WireFormat
from megatron_lion.exchange.pieces import PieceFormat
from megatron_lion.kernels.exchange import choose_exchange
from megatron_lion.kernels.reduce import choose_reduce

LR, WEIGHT_DECAY = 1e-9, 0.1  # so small that repeated replays leave the parameters where they are


def nanoseconds(call: Callable[[], object], parameters: int, repeats: int) -> float:
    """The best time of ``call`` for one parameter."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(repeats + 1):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best * 1e9 / parameters


def rows(parameters: int, exceptions: float, repeats: int) -> list[tuple[str, str, float, float, float]]:
    """For each format: what was timed, bytes moved for a parameter, its nanoseconds, and those of a copy."""
    kernels = choose_exchange("auto", torch.device("cpu"))
    found = []
    signs = torch.randint(-1, 2, (parameters,), dtype=torch.int8)
    for dtype, half_away in FORMATS:
        params = (torch.randn(parameters) * 0.02).to(dtype)
        rates = {"lr": LR, "weight_decay": WEIGHT_DECAY, "half_away": half_away}
        after = params.clone()
        digits = kernels.sign_digits(params, after, signs, **rates)
        if dtype != torch.float32:
            digits.masked_fill_(torch.rand(parameters) < exceptions, EXCEPTION)
        form = WireFormat(dtype, parameters, int((digits >= EXCEPTION).sum()), half_away)
        messages = form.new_messages(1)
        runs = [Run(0, parameters, LR, WEIGHT_DECAY)]
        wide, sent = dtype.itemsize, form.nbytes / parameters
        timed = {
            "digits": (
                2 if wide == 4 else 2 * wide + 2,
                lambda p=params, a=after, r=rates: kernels.sign_digits(p, a, signs, **r),
            ),
            "write": (
                wide + 1 + sent,
                lambda m=messages, d=digits, p=params, f=form: kernels.write_message_(m[0], d, p, f),
            ),
            "replay": (2 * wide + sent, lambda m=messages, p=params, f=form, r=runs: kernels.replay_(p, m, r, f)),
        }
        for name, (moved, call) in timed.items():
            copy = copy_nanoseconds(moved, parameters, repeats)
            label = f"{str(dtype).removeprefix('torch.')}{' half away' if half_away else ''}"
            found.append((label, f"{name} ({kernels.name})", moved, nanoseconds(call, parameters, repeats), copy))
    return found


def reduce_rows(parameters: int, repeats: int) -> list[tuple[str, str, float, float, float]]:
    """The same for each code of packed fp32 gradients, with a residual in int8, and for the sum of four ranks."""
    kernels = choose_reduce("auto", torch.device("cpu"))
    gradient = torch.randn(parameters)
    found = []
    for code in CODES:
        form = PieceFormat(code, parameters)
        messages = torch.zeros(3, form.nbytes, dtype=torch.uint8)
        residual = Residual.zeros("int8", parameters, "cpu")
        sent = form.nbytes / parameters
        timed = {
            "pack": (
                4 + sent + 2 * residual.nbytes / parameters,
                lambda m=messages, r=residual, f=form: kernels.write_blocks_(m[0], gradient, r, f),
            ),
            "sum of 4": (8 + 3 * sent, lambda m=messages, f=form: kernels.sum_blocks(gradient, m, 0, f)),
        }
        for name, (moved, call) in timed.items():
            copy = copy_nanoseconds(moved, parameters, repeats)
            found.append((code, f"{name} ({kernels.name})", moved, nanoseconds(call, parameters, repeats), copy))
    return found


def copy_nanoseconds(moved: float, parameters: int, repeats: int) -> float:
    """The best time for one parameter of a copy that moves ``moved`` bytes for each."""
    source = torch.zeros(int(moved * parameters / 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    return nanoseconds(lambda: target.copy_(source), parameters, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parameters", type=int, default=16_000_000, help="elements of the message (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--exceptions", type=float, default=0.003, help="share of 16-bit parameters (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="measurements (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(f"{args.parameters:,} parameters, {args.threads} thread(s)")
    print(f"{'format':20} {'pass':20} {'bytes':>6} {'ns':>7} {'GB/s':>6} {'copy ns':>8}")
    found = rows(args.parameters, args.exceptions, args.repeats) + reduce_rows(args.parameters, args.repeats)
    for label, name, moved, ours, copy in found:
        print(f"{label:20} {name:20} {moved:6.2f} {ours:7.3f} {moved / ours:6.1f} {copy:8.3f}")


if __name__ == "__main__":
    main()
