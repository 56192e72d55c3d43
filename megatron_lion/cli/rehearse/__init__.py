"""``megatron-lion rehearse``: the start of a run, rank by rank in one process each, without a GPU."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration.cpu import run_flags

DESCRIPTION = """Build some ranks of a run one after another, without a GPU and without the other ranks, up to the first
step: flags, process groups, model, gradient buffers, optimizer, checkpoint. Prints their memory and messages. Exit
status: 0 if they would start and fit, 1 if they need more than --gpu-memory, 2 if one would not start."""


def parser(base: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The command line."""
    made = base(
        prog="megatron-lion rehearse",
        usage="megatron-lion rehearse --world-size N [options] SCRIPT [flags of the script]",
        description=DESCRIPTION,
    )
    add = made.add_argument
    add("--world-size", type=int, metavar="N", help="ranks of the run; required")
    add("--rank", type=int, action="append", metavar="R", help="rank to rehearse; may be repeated")
    add(
        "--ranks",
        choices=("distinct", "all"),
        help="distinct, the default: one rank of each kind: first, middle and last pipeline stage (every stage if "
        "layers differ), each with its first and last data-parallel shard",
    )
    add("--gpu-memory", type=float, metavar="GiB", help="memory of a GPU; exit with 1 if a rank needs more")
    add("--steps", type=int, default=0, metavar="K", help="also run K steps on random tokens, in real memory")
    add("--json", type=Path, metavar="FILE", help="write the reports of the ranks to FILE")
    add("--estimate", type=json.loads, default={}, help=argparse.SUPPRESS)  # from launch.py: bytes by kind
    add("script", help="your Megatron script, such as pretrain_gpt.py")
    add("flags", nargs=argparse.REMAINDER, help="its flags, as on the cluster")
    return made


def main(arguments: list[str], base: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    """Rehearse. Returns the exit status."""
    made = parser(base)
    options = made.parse_args(arguments)
    if problem := _problem(options):
        made.error(problem)
    os.environ.update(run_flags.ENVIRONMENT)  # before torch is imported
    from megatron_lion.cli.rehearse import ranks, report

    try:
        reports = ranks.rehearse(options)
    except LionError as error:
        print(f"megatron-lion: error: {error}", file=sys.stderr)
        return 2
    except ranks.WouldNotStart as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in reports], indent=1), encoding="utf-8")
    print(report.text(reports, options.estimate, options.gpu_memory))
    return int(report.is_too_large(reports, options.gpu_memory))


def _problem(options: Any) -> str | None:
    """The first problem with the options, or None."""
    if options.world_size is None:
        return "--world-size is missing: set it before SCRIPT, what follows SCRIPT are its flags"
    if options.world_size < 1:
        return f"--world-size {options.world_size} must be at least 1"
    for rank in options.rank or ():
        if not 0 <= rank < options.world_size:
            return f"--rank {rank} is not a rank of --world-size {options.world_size}: 0 to {options.world_size - 1}"
    if options.rank and options.ranks:
        return "--rank and --ranks are both set: use one of them"
    if options.steps < 0:
        return f"--steps {options.steps} must be at least 0"
    if options.gpu_memory is not None and not options.gpu_memory > 0:
        return f"--gpu-memory {options.gpu_memory:g} must be above 0"
    if options.json and not options.json.parent.is_dir():
        return f"--json {options.json}: the folder {options.json.parent} does not exist. Create it first"
    if not Path(options.script).is_file() or options.script.endswith(".sh"):
        return (
            f"{options.script} is not a Python file: pass your Megatron script, such as pretrain_gpt.py, then its flags"
        )
    return None
