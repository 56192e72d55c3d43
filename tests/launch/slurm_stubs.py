"""Stand-ins for scontrol and srun, and the script that runs with them."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from launch.launcher import slurm
from tests.launch.recipe_cases import recipe


def script(*case: str, **settings: object) -> str:
    """The batch script of a recipe with overrides."""
    overrides = (f"{key}={value}" for key, value in settings.items())
    return slurm.script(recipe(*case, *overrides), [], sys.executable)


def install(folder: Path) -> None:
    """In ``folder``/bin: scontrol logs its words to scontrol.log, srun to srun.log, one a line; then srun does $ACT."""
    (folder / "bin").mkdir()
    tools = {
        "scontrol": f'[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" >> {folder}/scontrol.log',
        "srun": f'printf "%s\\n" "$@" > {folder}/srun.log; eval "$ACT"',
    }
    for name, body in tools.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(stat.S_IRWXU)


def run(folder: Path, act: str, text: str = "", *, nodes: int = 2, job: int = 42) -> subprocess.CompletedProcess[str]:
    """Run a script, by default tiny_gpt's, where :func:`install` was called; srun does ``act``."""
    settings = {"train-iters": 300, "nodes": nodes}
    text = text or script("tiny_gpt", "lion", "cpu", run=folder / "run", **settings)
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": str(job), "ACT": act}
    environment["SEEN"] = str(folder / "seen")
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, check=False)


def srun_words(folder: Path) -> list[str]:
    """The words that srun got."""
    return (folder / "srun.log").read_text().splitlines()
