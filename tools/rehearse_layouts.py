"""Rehearse layouts of public models and the project's recipes, and write docs/results/rehearse.md.

    python tools/rehearse_layouts.py --output docs/results/rehearse.md --megatron FOLDER [FOLDER ...]
    python tools/rehearse_layouts.py --only llama3_8b --output /tmp/page.md            one of them

Each FOLDER has another release of Megatron: pip install --no-deps --target FOLDER megatron-core==0.17.1
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rehearsed import page
from rehearsed.layouts import LAYOUTS, OTHER_RANKS, REFUSED, STORAGES, Layout

from megatron_lion.config import LionError
from megatron_lion.integration.cpu import run_flags

os.environ.update(run_flags.ENVIRONMENT)  # before torch is imported

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "pretrain_gpt.py"
RECIPES = ("gpt2_small", "gpt2_medium", "bert_small", "bert_base")
FEW_STORAGES = ("fp32, fp32", "int8, remainder")


def rehearse(script: Path, flags: list[str], ranks: int, chosen: list[int] | None) -> tuple[list[Any], dict[str, Any]]:
    """The reports of ``chosen`` ranks, or of the distinct ones, and what they cost."""
    from megatron_lion.cli.rehearse import ranks as processes

    began, cpu = time.monotonic(), _cpu_seconds()
    options = SimpleNamespace(script=str(script), flags=flags, world_size=ranks, rank=chosen, ranks=None, steps=0)
    reports = processes.rehearse(options)
    host = max(report.host_bytes for report in reports)
    return reports, {"seconds": time.monotonic() - began, "cpu": _cpu_seconds() - cpu, "host": host}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def recipe_row(name: str) -> dict[str, Any]:
    """A recipe with Lion on a100x16, and the recipe's estimate."""
    from launch.launcher import estimates, recipes, rehearsal

    rates = ["lr=1e-5", "min-lr=0", "weight-decay=0.1"]  # which the recipes for BERT do not have
    recipe = recipes.resolve(name, "lion", "a100x16", rates)
    reports, cost = rehearse(ROOT / "launch" / recipe["script"], rehearsal.flags(recipe, []), recipe.ranks, None)
    fullest = max(reports, key=lambda report: int(report.sizes["on_device"]))
    needed = estimates.memory(recipe)
    expected = {"weights": needed.weights, "gradients": needed.gradients, "state": needed.state}
    return {"table": "recipes", "name": name, "ranks": len(reports), **_built(fullest.sizes, expected), **cost}


def layout_row(name: str, layout: Layout, storage: str) -> dict[str, Any]:
    """A layout with one precision of the state, and what the architecture says."""
    flags, state_bytes = STORAGES[storage]
    words = f"{layout.command_line} {flags}".split()
    (report,), cost = rehearse(SCRIPT, words, layout.ranks, [layout.rank])
    sizes = f"TP {layout.tp}, PP {layout.pp}" + (f", EP {layout.ep}" if layout.ep > 1 else "")
    return {
        "table": "layouts", "name": name, "rank": layout.rank, "ranks": layout.ranks, "sizes": sizes,
        "storage": storage, **_built(report.sizes, layout.expected(state_bytes)), **cost,
    }  # fmt: skip


def refused_row(name: str, layout: Layout) -> dict[str, Any]:
    """The message with which a layout is refused."""
    from megatron_lion.cli.rehearse.ranks import WouldNotStart

    try:
        rehearse(SCRIPT, layout.command_line.split(), layout.ranks, [0])
    except (LionError, WouldNotStart) as error:
        *_, said, _ = str(error).splitlines()  # the last line names the rank
        return {"table": "refused", "name": name, "said": said.removeprefix("megatron-lion: error: ")}
    sys.exit(f"{name} is not refused")


def _built(sizes: dict[str, int], expected: Mapping[str, float]) -> dict[str, Any]:
    built = {kind: sizes[kind] for kind in ("weights", "gradients")}
    built["state"] = sizes["momentum"] + sizes["masters"]
    return {"parameters": sizes["parameters"], "total": sizes["on_device"], "built": built, "expected": expected}


def write_rows(file: Path, wanted: list[str]) -> None:
    """Rehearse everything with the Megatron that this process imports, a line of JSON each."""
    from megatron_lion.integration.compat.versions import megatron_version

    def write(row: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"megatron": megatron_version(), **row}) + "\n")

    for name in (name for name in RECIPES if name in wanted):
        write(recipe_row(name))
    for layouts, storages in ((LAYOUTS, tuple(STORAGES)), (OTHER_RANKS, FEW_STORAGES)):
        for name in (name for name in layouts if name in wanted):
            for storage in storages:
                write(layout_row(name, layouts[name], storage))
    for name, layout in REFUSED.items():
        if name.split(",")[0].split()[0] in wanted:
            write(refused_row(name, layout))


def main() -> None:
    """Rehearse with each release in a process, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--megatron", nargs="*", metavar="FOLDER", help="folders of other releases")
    names = (*RECIPES, *LAYOUTS)
    parser.add_argument("--only", nargs="*", choices=names, help="some of them (default: all)")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)  # a process for one release
    options = parser.parse_args()
    if options.rows:
        write_rows(options.output, options.only)
        return
    wanted = options.only or names
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        for release in (*(options.megatron or ()), ""):
            path = os.pathsep.join(filter(None, (release, os.environ.get("PYTHONPATH"))))
            line = [sys.executable, __file__, "--rows", "--output", str(rows), "--only", *wanted]
            subprocess.run(line, check=True, env={**os.environ, "PYTHONPATH": path})
        found = [json.loads(row) for row in rows.read_text(encoding="utf-8").splitlines()]
    options.output.write_text(page.text(found, datetime.date.today()), encoding="utf-8")


if __name__ == "__main__":
    main()
