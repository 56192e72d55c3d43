"""Start a recipe: a model with an optimizer on a cluster, each a file in configs/ (or a YAML file of your own).

    python launch/launch.py tiny_gpt lion cpu                            here, now
    python launch/launch.py gpt2_small lion a100x16 --dry-run            what would run, and what it needs
    python launch/launch.py gpt2_small lion a100x16 --print              the torchrun line of each node
    python launch/launch.py gpt2_small sgd a100x16 --slurm lr=3e-4       a Slurm job
    python launch/launch.py tiny_gpt lion cpu train-iters=20 -- --log-params-norm      further flags of Megatron's

Everything is checked before a process starts. The run's folder (key run) holds recipe.json, log.txt, checkpoints/,
tensorboard/ and norm_ratio.jsonl; the same line given again resumes from the last checkpoint.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_lion.config import GATHERS, LionError
from megatron_lion.version import __version__

from . import child_process, commands, estimates, progress_line, recipe_checks, recipes, tail
from .recipes import ROOT, Recipe

# Keys that must not change when a run resumes from its checkpoints.
FIXED = (
    "script", "num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size", "max-position-embeddings",
    "tokenizer-type", "optimizer", "lr", "min-lr", "train-iters", "lr-decay-iters",
)  # fmt: skip


def report(recipe: Recipe, extra: list[str]) -> str:
    """The resolved recipe, the command and what it needs, as text."""
    needed, wire = estimates.memory(recipe), estimates.wire_bytes_per_step(recipe)
    tokens = recipe["global-batch-size"] * recipe["seq-length"]
    flops = estimates.flops_per_step(recipe)
    sizes = " x ".join(f"{name} {size}" for name, size in {**recipe.layout, "DP": recipe.dp}.items())
    rows = {
        "ranks": f"{recipe['nodes']} x {recipe['gpus-per-node']} ({sizes})",
        "parameters": f"{estimates.total_parameters(recipe):,}, vocabulary {estimates.padded_vocabulary(recipe):,}",
        "steps": f"{recipe['train-iters']:,}",
        "tokens": f"{tokens:,} a step, {tokens * recipe['train-iters']:.3g} in all",
        "memory on the fullest": _memory_row(needed, recipe["gpu-memory-gib"]),
        "floating-point operations": f"{flops:.3g} a step ({flops / recipe.ranks:.3g} on each GPU)",
        "sent by each GPU": ", ".join(f"{name} {_size(count)}" for name, count in wire.items() if count) or "nothing",
    }
    if recipe["optimizer"] == "lion" and recipe.get("use-distributed-optimizer") and recipe.dp > 1:
        rows["gather after a step"] = _gather_row(recipe)
    if interval := recipe.get("norm-ratio-interval"):
        rows["norm-ratio rounds"] = f"{recipe['norm-ratio-batches']} batches every {interval:,} steps"
    if peak := recipe.get("gpu-peak-tflops"):
        rows["a step at 40 % of the peak"] = f"{flops / recipe.ranks / (0.4e12 * peak):.3g} s"
    settings = "\n".join(f"  {key}: {value}" for key, value in sorted(recipe.settings.items()))
    text = f"recipe {' '.join(recipe.names)}\n{settings}\n\n"
    text += "\n".join(f"{name:26} {value}" for name, value in rows.items())
    if missing := recipe_checks.missing_files(recipe):
        text += "\n\nnot on this machine:\n" + "\n".join(f"  {entry}" for entry in missing)
    return f"{text}\n\n{commands.printed(recipe, extra)}\n"


def _memory_row(needed: estimates.Memory, there: float) -> str:
    parts = ("weights", "gradients", "state", "round_copy", "activations")
    listed = " + ".join(
        f"{name.replace('_', ' ')} {_size(getattr(needed, name))}" for name in parts if getattr(needed, name)
    )
    return f"{_size(needed.total)} of {there:g} GiB: {listed}"


def _gather_row(recipe: Recipe) -> str:
    """Bytes and time of the gather in use, then of the other one."""
    used = recipe.get("lion-gather", "params")
    parts = []
    for gather in sorted(GATHERS, key=lambda gather: gather != used):
        seconds = estimates.gather_seconds(recipe, gather)
        time = "" if seconds is None else f" ({1000 * seconds:.3g} ms at {recipe['gpu-link-gbps']:g} Gb/s)"
        parts.append(f"lion-gather={gather} {_size(estimates.gather_bytes(recipe, gather))}{time}")
    return f"{parts[0]}; with {parts[1]}"


def _size(count: int) -> str:
    return f"{count / estimates.GIB:.2f} GiB" if count >= estimates.GIB / 10 else f"{count / 2**20:.2f} MiB"


def versions() -> dict[str, str | None]:
    """Versions that a run depends on. The commit ends in + if the checkout has uncommitted changes."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "megatron-lion": __version__}
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        found["commit"] = commit + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        found["commit"] = None
    return found


def prepare_folder(recipe: Recipe, extra: list[str]) -> Path:
    """Make the run's folder and save the recipe in it; each start with another recipe or code gets another file.

    Raises LionError where checkpoints there belong to another run.
    """
    folder = Path(recipe["run"])
    saved = sorted(folder.glob("recipe*.json"), key=lambda path: path.stat().st_mtime)
    if saved and (folder / "checkpoints" / "latest_checkpointed_iteration.txt").is_file():
        before = json.loads(saved[-1].read_text(encoding="utf-8"))["settings"]
        for key in FIXED:
            if before.get(key) != recipe.get(key):
                raise LionError(
                    f"{folder} holds checkpoints of a run with {key}={before.get(key)}, not {recipe.get(key)}: use "
                    f"another folder as run=..., or {key}={before.get(key)} to resume that run"
                )
    folder.mkdir(parents=True, exist_ok=True)
    content = commands.record(recipe, extra, versions())
    if not saved or saved[-1].read_text(encoding="utf-8") != content:
        name = f"recipe-{len(saved) + 1}.json" if saved else "recipe.json"
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def run_here(recipe: Recipe, extra: list[str]) -> int:
    """Run torchrun on this machine, its output in log.txt and, with readable steps, on the screen. Returns its status.

    Ctrl-C, SIGTERM and SIGHUP end the run: the ranks save, and this function returns when torchrun has ended.
    """
    if recipe["nodes"] > 1:
        raise LionError(
            f"{recipe['nodes']} nodes cannot be started from here: use --slurm, or --print and a line on each node"
        )
    if recipe["device"] == "cuda":
        import torch

        if torch.cuda.device_count() < recipe["gpus-per-node"]:
            raise LionError(
                f"gpus-per-node is {recipe['gpus-per-node']}, but torch sees {torch.cuda.device_count()} GPUs here: "
                "set gpus-per-node, or take the cluster cpu"
            )
    folder = prepare_folder(recipe, extra)
    line = commands.torchrun(recipe, extra, [sys.executable, "-m", "torch.distributed.run"])
    environment = {**os.environ, **recipe.environment}
    path = folder / "log.txt"
    start = path.stat().st_size if path.exists() else 0
    with (
        path.open("ab") as log,
        child_process.tied(line, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        for text in tail.lines_of(path, start, lambda: process.poll() is not None):
            shown = progress_line.readable(text, recipe)
            print(text if shown is None else f"{shown}\n", end="", flush=True)
    return process.returncode


def submit(recipe: Recipe, extra: list[str], python: str) -> int:
    """Write the batch script into the run's folder and hand it to sbatch; without sbatch, say how."""
    script = commands.slurm_script(recipe, extra, python)
    path = prepare_folder(recipe, extra) / "job.sh"
    path.write_text(script, encoding="utf-8")
    try:
        return subprocess.run(["sbatch", str(path)], check=False).returncode
    except FileNotFoundError:
        raise LionError(f"sbatch is not on this machine; {path} is written: run sbatch on it where Slurm is") from None


def main(arguments: list[str]) -> int:
    """Read the command line, resolve, check, and do what was asked. Returns the exit status."""
    own, extra = (
        (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :])
        if "--" in arguments
        else (arguments, [])
    )
    known = "\n".join(f"  {kind:11} {recipes.known(kind)}" for kind in recipes.KINDS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"configs/:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="launch.py MODEL OPTIMIZER CLUSTER [key=value ...] [--dry-run | --print | --slurm] [-- FLAGS]",
    )
    for name in ("model", "optimizer", "cluster"):
        parser.add_argument(name)
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings that differ from the files'")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say what would run and what it needs; start nothing")
    what.add_argument("--print", action="store_true", help="print the torchrun line of each node; start nothing")
    what.add_argument("--slurm", action="store_true", help="write the batch script and submit it")
    options = parser.parse_intermixed_args(own)
    recipe = recipes.resolve(options.model, options.optimizer, options.cluster, options.override)
    recipe_checks.check(recipe, extra)
    if options.dry_run:
        print(report(recipe, extra))
        return 0
    if options.print:
        print(commands.printed(recipe, extra))
        return 0
    recipe_checks.check_files(recipe)
    return submit(recipe, extra, sys.executable) if options.slurm else run_here(recipe, extra)
