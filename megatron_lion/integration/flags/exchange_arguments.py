"""Flags for what data-parallel ranks send each other: ``--lion-gather``, ``--lion-reduce`` and their settings."""

import argparse

from megatron_lion.config import ERROR_FEEDBACKS, GATHERS, REDUCES, LionOptions


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    parser.add_argument(
        "--lion-gather",
        default=LionOptions.gather,
        metavar=f"{{{','.join(GATHERS)}}}",
        help="What data-parallel ranks send each other after a step: the parameters, or the signs of the step, which "
        "are a fifth of the bytes and give the same bits (docs/exchange.md) (default: %(default)s).",
    )
    parser.add_argument(
        "--lion-gather-refresh",
        type=int,
        default=LionOptions.gather_refresh,
        metavar="N",
        help="With --lion-gather signs: send the parameters after every N steps; 0: only where they must be (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--lion-reduce",
        default=LionOptions.reduce,
        metavar=f"{{{','.join(REDUCES)}}}",
        help="EXPERIMENTAL, changes training: how data-parallel ranks send each other gradients. stock: as Megatron "
        "does. int8, int4, ternary: in blocks of 64 with one scale, 8.3, 4.3 or 1.9 bits per parameter instead of 32 "
        "(docs/exchange.md) (default: %(default)s).",
    )
    parser.add_argument(
        "--lion-error-feedback",
        default=LionOptions.error_feedback,
        metavar=f"{{{','.join(ERROR_FEEDBACKS)}}}",
        help="With --lion-reduce: how a rank stores its residual, which it adds to its next gradient. int8 and bf16 "
        "need 1 or 2 bytes for each parameter on every rank; none drops it (default: %(default)s).",
    )
