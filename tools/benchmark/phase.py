"""Megatron's whole optimizer phase on a CPU: this package's Lion, and stock Megatron's Lion and Adam.

What is timed is the step that Megatron's training loop calls: gradient norm, clipping, update, bf16 parameters, in its
real DistributedOptimizer on real gradient buffers. As with --overlap-param-gather, the all-gather is part of the next
forward pass. It has a separate row; with ``--wait-for-gather`` each step ends with it. All candidates step the same
buffers in turn, and medians are printed; the gradient is put back before each step, so that every step clips.

    python -m tools.benchmark.phase --threads 2 --rounds 7 --json runs/phase.json
    python -m tools.benchmark.phase --host --threads 1 --rounds 30
    python -m tools.benchmark.phase --ranks 1 2 4 --threads 1

``--host`` steps 300 and 3,000 parameters of 8 elements instead: what is left is the host's own time. ``--ranks`` starts
as many gloo ranks in turn and prints the milliseconds of a step on rank 0, for a model of the same size.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import megatron_lion
from tools.benchmark import measure
from tools.benchmark.shapes import MODELS, machine, shapes

HOST_PARAMETERS = (300, 3000)
STOCK = ("adam", "adam-fused", "lion")


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    if args.ranks:
        print(scaling(args.ranks, args))
        return
    os.environ["MEGATRON_LION_DEVICE"] = "cpu"
    warnings.filterwarnings("ignore", module="megatron")  # of what is not installed
    megatron_lion.register()
    from tools.benchmark import megatron_phase  # Megatron, once CUDA's calls are answered

    megatron_phase.start_ranks()
    tables = {}
    for title, sizes in models(args).items():
        model = megatron_phase.Model(sizes, overlaps_gather=not args.wait_for_gather)
        with contextlib.redirect_stdout(sys.stderr):  # start-up messages do not belong to the table
            candidates = megatron_phase.candidates(model, args.peers)
        limits = [] if args.host else measure.limits(candidates)
        times = measure.measure([*candidates, *limits], args.rounds, evict=not args.host)
        tables[title] = measure.rows(candidates, times, model.numel)
    ranks = torch.distributed.get_world_size()
    if torch.distributed.get_rank() == 0:
        print(f"DP {ranks}; {machine()}; medians of {args.rounds} rounds\n\n{described(tables, args.host)}\n")
        if args.json:
            rows = {title: [asdict(row) for row in table] for title, table in tables.items()}
            measure.write_json(args.json, machine=machine(), ranks=ranks, tables=rows)
    torch.distributed.destroy_process_group()


def described(tables: dict[str, list[measure.Row]], host: bool) -> str:
    """A table for each model; of the host's own time, which no memory limits, a column for each."""
    if host:
        return table_of({title: {row.name: row.milliseconds for row in tables[title]} for title in tables}, "ms a step")
    return "\n\n".join(f"{title}:\n\n{measure.markdown(table)}" for title, table in tables.items())


def models(args: argparse.Namespace) -> dict[str, list[tuple[int, ...]]]:
    """The parameters' shapes of each model that was asked for."""
    if args.host:
        return {f"{number:,} parameters of 8 elements": [(8,)] * number for number in HOST_PARAMETERS}
    return {f"{args.numel:,} elements": [(args.numel,)]} if args.numel else {args.shapes: shapes(args.shapes)}


def scaling(ranks: list[int], args: argparse.Namespace) -> str:
    """A column of milliseconds for each number of ranks, each measured by a run of this script under torchrun."""
    columns: dict[int, dict[str, float]] = {}
    for number in ranks:
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
            command += [
                "-m",
                "tools.benchmark.phase",
                "--threads",
                str(args.threads),
                "--rounds",
                str(args.rounds),
                "--json",
                str(record),
            ]
            command += ["--shapes", args.shapes, "--peers", *args.peers]
            command += ["--numel", str(args.numel)] if args.numel else []
            command += ["--wait-for-gather"] if args.wait_for_gather else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (rows,) = json.loads(record.read_text())["tables"].values()
        columns[number] = {row["name"]: row["milliseconds"] for row in rows}
    return table_of(columns, f"ms a step on rank 0 of DP, {args.threads} threads each")


def table_of(columns: dict[Any, dict[str, float]], title: str) -> str:
    """Rows by name, a column for each key, as Markdown."""
    lines = [f"| {title} | {' | '.join(map(str, columns))} |", "|---|" + "---|" * len(columns)]
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | {' | '.join(f'{column[name]:.1f}' for column in columns.values())} |")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", choices=tuple(MODELS), default="gpt2-small", help="whose parameters (default: %(default)s)"
    )
    parser.add_argument("--numel", type=int, help="one flat tensor of so many elements instead")
    parser.add_argument("--host", action="store_true", help="many tiny parameters: the host's own time")
    parser.add_argument("--ranks", type=int, nargs="*", help="how many ranks to start, one number after the other")
    parser.add_argument("--wait-for-gather", action="store_true", help="the step ends with the parameters' all-gather")
    parser.add_argument("--peers", nargs="*", choices=STOCK, default=STOCK, help="which of stock's (default: all)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of a rank (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that are counted (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    return parser


if __name__ == "__main__":
    main()
