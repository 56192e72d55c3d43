"""The Slurm script: sound shell for every recipe, and what it does when srun ends well, badly or early."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_cases import CASES, commands, recipe

from megatron_lion.config import LionError


def script(*case: str, **settings: object) -> str:
    return commands.slurm_script(recipe(*case, *(f"{k}={v}" for k, v in settings.items())), [], sys.executable)


@pytest.mark.parametrize("cluster", sorted({case[2] for case in CASES}))
def test_the_script_is_sound_shell(cluster: str, tmp_path: Path) -> None:
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    for model in ("tiny_gpt", "bert_base"):
        text = script(model, "lion", cluster, data="/data/a folder/it's", run=f"{tmp_path}/a run")
        assert "$$" not in text
        path = tmp_path / "job.sh"
        path.write_text(text)
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        if shellcheck:
            done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
    if not shellcheck:
        pytest.skip("bash -n passed; shellcheck is not installed")


def test_the_options_are_the_recipes() -> None:
    text = script("gpt2_small", "lion", "a100x16", **{"slurm-partition": "gpu", "slurm-account": "lab-1"})
    for line in (
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=24",
        "--partition=gpu",
        "--account=lab-1",
        "--time=2-00:00:00",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in text
    assert text.index("#SBATCH --requeue") < text.index("set -euo pipefail")
    assert "#SBATCH --gpus" not in script("tiny_gpt", "lion", "cpu")
    assert "#SBATCH --cpus-per-task=5\n" in script("tiny_gpt", "lion", "cpu", **{"slurm-cpus": 5})
    with pytest.raises(LionError, match=r"slurm-partition 'a b' is no value for sbatch's --partition"):
        script("tiny_gpt", "lion", "cpu", **{"slurm-partition": "a b"})


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with stand-ins for scontrol and srun: the first logs, the second notes its words and acts as told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tools = {
        "scontrol": f'[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" >> {tmp_path}/scontrol.log',
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/srun.log; eval "$ACT"',
    }
    for name, body in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return tmp_path


def run(cluster: Path, act: str, *, nodes: int = 2, job: int = 42) -> subprocess.CompletedProcess[str]:
    text = script("tiny_gpt", "lion", "cpu", run=cluster / "run", **{"train-iters": 300, "nodes": nodes})
    path = f"{cluster}/bin{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": str(job), "ACT": act}
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, check=False)


def saves(cluster: Path, iteration: int) -> str:
    folder = cluster / "run" / "checkpoints"
    return f"mkdir -p {folder}; printf {iteration} > {folder}/latest_checkpointed_iteration.txt"


def test_a_job_that_is_cut_short_is_queued_again_as_long_as_it_gets_further(cluster: Path) -> None:
    done = run(cluster, f"{saves(cluster, 100)}; exit 143")
    assert done.returncode == 0, done.stderr
    assert (cluster / "scontrol.log").read_text() == "requeue 42\n"
    words = (cluster / "srun.log").read_text().splitlines()
    assert words[:3] == ["--cpus-per-task=2", "--kill-on-bad-exit=1", sys.executable]
    assert words[words.index("--max-restarts") + 1] == "0"

    again = run(cluster, "exit 143")  # nothing new is saved
    assert again.returncode == 143
    assert "nothing saved since iteration 100: not queued again" in again.stderr
    assert (cluster / "scontrol.log").read_text() == "requeue 42\n"

    last = run(cluster, saves(cluster, 300))
    assert last.returncode == 0
    assert "done: iteration 300 of 300 is saved" in last.stdout
    assert (cluster / "scontrol.log").read_text() == "requeue 42\n"


@pytest.mark.parametrize(("act", "status"), [("exit 3", 3), ("exit 0", 1)])
def test_a_job_that_fails_at_its_start_is_not_queued_again(cluster: Path, act: str, status: int) -> None:
    done = run(cluster, act)
    assert done.returncode == status
    assert not (cluster / "scontrol.log").exists()


def meeting(cluster: Path, **job: int) -> list[str]:
    """The words with which the ranks of a job's nodes find each other."""
    assert run(cluster, saves(cluster, 300), **job).returncode == 0
    words = (cluster / "srun.log").read_text().splitlines()
    if "--standalone" in words:
        return ["--standalone"]
    return [words[words.index(flag) + 1] for flag in ("--rdzv-endpoint", "--rdzv-backend")]


def test_jobs_that_share_a_node_do_not_meet(cluster: Path) -> None:
    """Another job's store would take the ranks in, and end with that job."""
    assert meeting(cluster, nodes=1) == ["--standalone"]
    assert meeting(cluster, job=42) == ["node7:29542", "c10d"]
    assert meeting(cluster, job=1_000_043) == ["node7:29543", "c10d"]
