"""Start a recipe: a model, an optimizer and a cluster, each a file in configs/ or a YAML file of your own.

    python launch/launch.py tiny_gpt lion cpu                          run here
    python launch/launch.py gpt2_small lion h100x8 --dry-run           show settings, memory, hours and the command
    python launch/launch.py gpt2_small lion h100x8 --rehearse          build ranks of the run here, without a GPU
    python launch/launch.py llama_7b lion h100x32 --print              print the torchrun line of each node
    python launch/launch.py llama_7b lion h100x32 --slurm lr=8e-5      submit a Slurm job
    python launch/launch.py llama_7b lion h100x32 --slurm --print      print its batch script
    python launch/launch.py tiny_gpt lion cpu -- --log-params-norm     pass a further flag to Megatron

Everything is checked before a process starts. The folder of the run (key run) gets recipe.json, log.txt, checkpoints/,
tensorboard/ and norm_ratio.jsonl. The same command resumes from the last checkpoint.
"""

import argparse
import os
import subprocess
import sys
import textwrap

from megatron_lion.config import LionError
from megatron_lion.nearest import did_you_mean

from . import (
    child_process,
    commands,
    extra_flags,
    recipe_checks,
    recipe_files,
    recipes,
    rehearsal,
    report,
    run_folder,
    screen,
    slurm,
)
from .keys import TOPICS
from .recipes import Recipe

OPTIONS = ("--dry-run", "--rehearse", "--print", "--slurm", "--help")


def run_here(recipe: Recipe, extra: list[str]) -> int:
    """Run torchrun on this machine and return its status. Its output goes to log.txt and, step by step, to the screen.

    Ctrl-C, SIGTERM and SIGHUP end the run: the ranks save, and this function returns when torchrun has ended. So does a
    reader that closes the output (``launch.py ... | head``). Nothing else about the screen ends a run: a line that
    cannot be read is shown as it is, and other errors of the output turn off the screen.
    """
    if recipe["nodes"] > 1:
        raise LionError(
            f"{recipe['nodes']} nodes cannot be started from here: use --slurm, or --print and a line on each node"
        )
    if recipe["device"] == "cuda":
        recipe_checks.check_gpus(recipe)
    line = commands.torchrun(recipe, extra, [sys.executable, "-m", "torch.distributed.run"])
    environment = {**os.environ, **recipe.environment}
    with run_folder.claimed(recipe) as locks:
        path = run_folder.save_recipe(recipe, extra) / "log.txt"
        with run_folder.writing("run", path.parent):
            log = path.open("ab")
        start = log.tell()
        with (
            log,
            child_process.tied(line, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=locks) as process,
        ):
            screen.follow(process, path, start, recipe)
    return process.returncode


def submit(recipe: Recipe, extra: list[str], python: str) -> int:
    """Write the batch script into the run's folder and submit it. Raises LionError if there is no sbatch here."""
    script = slurm.script(recipe, extra, python)
    with run_folder.claimed(recipe):
        path = run_folder.save_recipe(recipe, extra) / "job.sh"
        for key, folder in slurm.folders_to_make(recipe).items():
            with run_folder.writing(key, folder):
                folder.mkdir(parents=True, exist_ok=True)
        with run_folder.writing("run", path.parent):
            run_folder.write(path, script)
    try:
        return subprocess.run(["sbatch", str(path)], check=False).returncode
    except FileNotFoundError:
        raise LionError(f"sbatch is not installed here. {path} was written: submit it where Slurm is") from None


def parser() -> argparse.ArgumentParser:
    """The command line up to ``--``."""
    files = "\n".join(f"  {kind:11} {recipe_files.known(kind)}" for kind in recipe_files.KINDS)
    keys = "\n".join(
        textwrap.fill(
            f"{topic}: {', '.join(entries)}", 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
        for topic, entries in TOPICS.items()
    )
    made = argparse.ArgumentParser(
        prog="launch.py",
        description=__doc__,
        epilog=f"files in configs/:\n{files}\n\nkeys (docs/recipes.md):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="launch.py MODEL OPTIMIZER CLUSTER [key=value ...] [--dry-run | --rehearse | [--slurm] [--print]] "
        "[-- FLAGS]",
    )
    made.add_argument("words", nargs="*", metavar="MODEL OPTIMIZER CLUSTER key=value", help="see above")
    made.add_argument("--dry-run", action="store_true", help="show settings, estimates and command; start nothing")
    made.add_argument("--rehearse", action="store_true", help="build ranks of the run here, without a GPU")
    made.add_argument("--print", action="store_true", help="print the torchrun line of each node; start nothing")
    made.add_argument("--slurm", action="store_true", help="submit a Slurm job; with --print, only print its script")

    def error(message: str) -> None:
        _, unknown, words = message.partition("unrecognized arguments: ")
        hint = f": {did_you_mean(words.split()[0], OPTIONS)}" if unknown else ""
        raise LionError(f"{message}{hint}. Usage: {made.usage}")

    made.error = error  # type: ignore[method-assign, assignment]
    return made


def main(arguments: list[str]) -> int:
    """Read the command line, resolve the recipe, check it, and do what was asked. Returns the exit status."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_intermixed_args(arguments[:end])
    names, own = options.words[:3], options.words[3:]
    if len(names) < 3 or any("=" in name and not name.endswith((".yaml", ".yml")) for name in names):
        raise LionError(
            f"expected MODEL OPTIMIZER CLUSTER, got {' '.join(names) or 'nothing'}: for example tiny_gpt lion cpu. "
            "--help lists the names"
        )
    if options.rehearse and (options.dry_run or options.slurm or options.print):
        raise LionError("--rehearse goes with none of --dry-run, --print and --slurm: remove one")
    if options.dry_run and (options.slurm or options.print):
        raise LionError("--dry-run does not show the Slurm script: remove it, or use --slurm --print")
    flags, extra = extra_flags.split(arguments[end + 1 :])
    overrides = [*own, *flags]
    on_cpu = os.environ.get("MEGATRON_LION_DEVICE") == "cpu"
    runs_here = not (options.slurm or options.print or options.rehearse)
    if on_cpu and runs_here and not any(override.startswith("device=") for override in overrides):
        overrides.append("device=cpu")
    recipe = recipes.resolve(*names, overrides)
    recipe_checks.check(recipe, extra)
    if options.dry_run:
        screen.show(report.report(recipe, extra))
        return 0
    for note in recipe.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.rehearse:
        return rehearsal.run(recipe, extra)
    if not options.print:
        recipe_checks.check_files(recipe)
        if not options.slurm:
            return run_here(recipe, extra)
    for warning in recipe_checks.warnings(recipe):  # a run here prints it itself
        print(f"warning: {warning}", file=sys.stderr)
    if options.print:
        screen.show(slurm.script(recipe, extra, sys.executable) if options.slurm else commands.printed(recipe, extra))
        return 0
    return submit(recipe, extra, sys.executable)
