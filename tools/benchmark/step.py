"""Time of one optimizer step, and its share of the memory's speed: this package's Lion next to other optimizers.

Candidates of one table step the same parameters in turn, each with its own state. They run in one process in rounds of
random order, and medians are printed, so that a machine that slows down slows all of them. On a CPU each step finds the
caches full of other memory, as after a backward pass. Bytes are counted, and the limit is a streaming pass in place
over the same tensors, with the same reads and writes and one addition (benchmark/traffic.py).

On a GPU the candidates are built and measured one after another: several queued steps between two events, separately
the host's time, and the share of a copy's speed. Each row is printed, and written to --rows, as soon as it is measured
(benchmark/queued.py).

    python -m tools.benchmark.step --threads 2 --rounds 9 --peers all --json runs/step.json --plot runs/step.svg

The peers are optional. The first line installs them outside the environment. Missing ones are listed with the reason:

    pip install --no-deps --target peers -r tools/benchmark/peers.txt
    PYTHONPATH=peers PATH=$PWD/peers/bin:$PATH python -m tools.benchmark.step --peers all
"""

import argparse
import contextlib
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_lion import LionError
from tools.benchmark import measure, ours, peers, queued, queued_rows
from tools.benchmark.shapes import MODELS, machine, parameters, shapes


def main() -> None:
    args = arguments().parse_args()
    names = peers.chosen(args.peers)
    torch.set_num_threads(args.threads)
    sizes = [(args.numel,)] * args.tensors if args.numel else shapes(args.shapes)
    params = parameters(sizes, args.device)
    numel = sum(param.numel() for param in params)
    if args.queued or args.device == "cuda":
        measure_queued(args, params, names, f"{len(sizes)} tensors, {numel:,} elements; {machine(args.device)}")
        return
    candidates, missing = ours.build(params)
    with contextlib.redirect_stdout(sys.stderr):  # messages of peers do not belong to the table
        others, missing_peers = peers.build(params, names, args.device)
    candidates, missing = candidates + others, missing | missing_peers
    measured = [*candidates, *measure.limits(candidates)]
    times = measure.measure(measured, args.rounds, evict=args.device == "cpu")
    table = measure.rows(candidates, times, numel)
    title = f"{len(sizes)} tensors, {numel:,} elements; {machine(args.device)}; medians of {args.rounds} rounds"
    print(f"{title}\n\n{measure.markdown(table)}")
    print(measure.not_measured(missing))
    if args.json:
        rows = [asdict(row) for row in table]
        measure.write_json(args.json, machine=machine(args.device), numel=numel, rows=rows, missing=missing)
    if args.plot:
        measure.plot(table, args.plot, title)


def measure_queued(args: argparse.Namespace, params: peers.Params, names: list[str], title: str) -> None:
    """Measure as on a GPU; exit status 1 where a candidate of ours could not be measured."""
    chosen = queued.builders(params, names, args.device)
    chosen = {name: chosen[name] for name in chosen if any(word in name for word in args.only)}
    numel = sum(param.numel() for param in params)
    table = queued.run(title, chosen, numel, queued.Device(args.device), args.rows)
    print(f"\n{title}; medians of {queued.ROUNDS} rounds\n\n{queued_rows.markdown(table)}")
    if args.json:
        measure.write_json(args.json, machine=machine(args.device), numel=numel, rows=[asdict(row) for row in table])
    failed = [row.name for row in table if row.error and row.name.startswith(measure.OURS)]
    if failed:
        sys.exit(f"benchmark_step: not measured: {'; '.join(failed)}")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        choices=tuple(MODELS),
        default="gpt2-small",
        help="model with these shapes (default: %(default)s)",
    )
    parser.add_argument("--numel", type=int, help="one flat tensor of so many elements instead")
    parser.add_argument("--tensors", type=int, default=1, help="with --numel: so many of them (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where they are (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that are counted (default: %(default)s)")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["installed"],
        metavar="NAME",
        help="all; installed, without those that compile for minutes; or names of "
        f"{', '.join(peers.PEERS)} (default: installed)",
    )
    parser.add_argument("--queued", action="store_true", help="measure on a CPU as on a GPU, to rehearse that")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="queued: only candidates whose name has one of these"
    )
    parser.add_argument("--rows", type=Path, help="queued: append each row there as a JSON line when it is measured")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--plot", type=Path, help="draw the rows there as well, SVG or PNG")
    return parser


if __name__ == "__main__":
    try:
        main()
    except LionError as error:
        sys.exit(f"benchmark_step: {error}")
