"""A model, not a measurement: the part of the gather after a step that the forward pass does not hide, on GPUs.

    python -m tools.benchmark.exchange_model [--bandwidth 2.68e12] [--flops 4e14] [--tokens 4096]

For P parameters of a rank, w bits of each on the wire and a rate of R bit/s for one replica's ring::

    exposed = max(0, w P / R - forward) + passes,    forward = 2 P tokens / flops

Passes are those of the exchange that are in the way of the first forward pass: none for parameters, 4.4 bytes for each
parameter replayed, at the memory ``bandwidth``. Its default is 80 % of an H100's, which the kernels have not shown.
"""

import argparse
from collections.abc import Iterator, Sequence

MODELS = {"7B": 6.74e9, "70B, TP 8": 8.75e9}  # parameters of a rank
RATES = (10, 100, 400)  # Gb/s
WIDTHS = {"params": 16.0, "signs": 3.3}
REPLAY_BYTES = {"params": 0.0, "signs": 4.4}


def exposed_ms(parameters: float, gather: str, gigabits: float, args: argparse.Namespace) -> float:
    """Milliseconds of a step that wait for the gather."""
    wire = WIDTHS[gather] * parameters / (gigabits * 1e9)
    forward = 2 * parameters * args.tokens / args.flops
    return 1e3 * (max(0.0, wire - forward) + REPLAY_BYTES[gather] * parameters / args.bandwidth)


def rows(args: argparse.Namespace) -> Iterator[str]:
    """A Markdown table."""
    yield "| model | Gb/s | params, ms | signs, ms | saved, ms |"
    yield "|---|---|---|---|---|"
    for model, parameters in MODELS.items():
        for rate in RATES:
            params, signs = (exposed_ms(parameters, gather, rate, args) for gather in WIDTHS)
            yield f"| {model} | {rate} | {params:.0f} | {signs:.0f} | {params - signs:+.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bandwidth", type=float, default=2.68e12, help="bytes per second of a replay (default: %(default)s)"
    )
    parser.add_argument(
        "--flops", type=float, default=4e14, help="of the forward pass, per second (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=float, default=4096, help="of the first micro-batch on a rank (default: %(default)s)"
    )
    print("\n".join(rows(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
