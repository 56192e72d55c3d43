"""Reductions of gradients on slow links, stock and packed, between network namespaces.

    python -m tools.benchmark.reduce_network [--rates 50 100 1000] [--layouts 2x1 4x1 2x2] [--steps]

The network is that of ``tools.benchmark.exchange_network``. Each reduction, and both gathers of parameters, are timed
in turn in the same processes: medians. An exchange is one reduction and one gather. With ``--steps`` whole training
steps of a small GPT are timed instead: one run of Megatron for each arm, in which the rates follow each other.
Megabytes are what the first node's interface has sent.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.benchmark.exchange_network import exchange, network, parse, text_to_train_on, train

# Reduction and gather of each exchange, and the flags of the training steps.
ARMS = {
    "fp32": ("fp32", "params", ""),
    "bf16": ("bf16", "params", "--grad-reduce-in-bf16"),
    "fp32 accumulation": (
        "fp32 accumulation",
        "params",
        "--grad-reduce-in-bf16 --ddp-reduce-scatter-with-fp32-accumulation",
    ),
    "int4": ("int4", "params", "--lion-reduce int4"),
    "int4 + signs": ("int4", "signs", "--lion-reduce int4 --lion-gather signs"),
    "ternary + signs": ("ternary", "signs", "--lion-reduce ternary --lion-gather signs"),
}
HEADER = "| nodes x ranks | Mb/s | arm | reduction, ms | gather, ms | exchange, ms | times as fast | MB | times fewer |"
STEP_HEADER = "| nodes x ranks | Mb/s | arm | step, ms | times as fast |"


def load() -> str:
    """The load average of the machine."""
    return f"(load {os.getloadavg()[0]:.1f})"


def exchange_rows(layout: str, rates: Sequence[float], repeats: int) -> Iterator[str]:
    """One row for each rate and arm; the arms are compared with the first one."""
    nodes, ranks = map(int, layout.split("x"))
    for rate in rates:
        with network(nodes, rate) as names:
            (found,) = exchange(names, ranks, "--repeats", str(repeats), module="reduce_rank", timeout=900.0)
        ms, sent = found["ms"], found["bytes"]
        whole = {arm: ms[reduction] + ms[gather] for arm, (reduction, gather, _) in ARMS.items()}
        full = {arm: sent[reduction] + sent[gather] for arm, (reduction, gather, _) in ARMS.items()}
        for arm, (reduction, gather, _) in ARMS.items():
            yield (
                f"| {layout} | {rate:g} | {arm} | {ms[reduction]:.0f} | {ms[gather]:.0f} | {whole[arm]:.0f} | "
                f"{whole['fp32'] / whole[arm]:.1f} | {full[arm] / 1e6:.2f} | {full['fp32'] / full[arm]:.2f} |"
            )
        yield f"<!-- {layout}, {rate:g} Mb/s {load()} -->"


def step_rows(layout: str, rates: Sequence[float], text: Path) -> Iterator[str]:
    """One row for each rate and arm."""
    nodes, ranks = map(int, layout.split("x"))
    with network(nodes, rates[0]) as names:
        found = {arm: train(names, ranks, text, rates, *flags.split()) for arm, (_, _, flags) in ARMS.items()}
    for rate in rates:
        for arm, (medians, _) in found.items():
            faster = found["fp32"][0][rate] / medians[rate]
            yield f"| {layout} | {rate:g} | {arm} | {medians[rate]:.0f} | {faster:.2f} |"
    megabytes = ", ".join(f"{arm} {sent / 1e6:.1f}" for arm, (_, sent) in found.items())
    yield f"<!-- {layout}, MB of the whole runs: {megabytes} {load()} -->"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(__doc__.splitlines()[0], arguments)
    header = STEP_HEADER if args.steps else HEADER
    print(header, "|---" * (header.count("|") - 1) + "|", sep="\n", flush=True)
    with text_to_train_on() if args.steps else contextlib.nullcontext() as text:
        for layout in args.layouts:
            rows = step_rows(layout, args.rates, text) if text else exchange_rows(layout, args.rates, args.repeats)
            for row in rows:
                print(row, flush=True)


if __name__ == "__main__":
    main()
