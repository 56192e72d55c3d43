"""The Slurm script: sound shell for every recipe, and what it does when srun ends well, badly or early."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.launcher import main
from megatron_lion.config import LionError
from tests.launch.recipe_cases import CASES, ROOT
from tests.launch.slurm_stubs import install, run, script


@pytest.mark.parametrize("cluster", sorted({case[2] for case in CASES}))
def test_the_script_is_sound_shell(cluster: str, tmp_path: Path) -> None:
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    apptainer = {"container": "apptainer", "container-image": "docker://it's", "slurm-sbatch-args": "--comment='a b'"}
    for model, more in (("tiny_gpt", {}), ("bert_base", apptainer)):
        text = script(model, "lion_paper", cluster, **more, data="/data/a folder/it's", run=f"{tmp_path}/a run")
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
    text = script("gpt2_small", "lion_paper", "a100x16", **{"slurm-partition": "gpu", "slurm-account": "lab-1"})
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
    with pytest.raises(LionError, match=r"slurm-partition 'a b' is not valid for sbatch's --partition"):
        script("tiny_gpt", "lion", "cpu", **{"slurm-partition": "a b"})


# ---- values that mean something to a shell or to sbatch ----

STRANGE = (
    "a b",
    "it's",
    'say "hi"',
    "50%",
    "%j",
    "$HOME",
    "$(id)",
    "`id`",
    "a;b",
    "a&b",
    "a#b",
    "@HOST@",
    "é",
    "*",
    "!x",
)


def option(text: str, name: str) -> str:
    """What sbatch reads as an option: it splits the line as a shell does, but for backslashes, of which there are none.

    slurm/src/sbatch/opt.c, _get_argument; an unquoted # starts a comment.
    """
    (line,) = [line for line in text.splitlines() if line.startswith(f"#SBATCH --{name}=")]
    assert "\\" not in line
    (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=True)
    return word.removeprefix(f"--{name}=")


@pytest.mark.parametrize("strange", STRANGE)
def test_any_printable_name_reaches_sbatch_and_torchrun_as_it_is(tmp_path: Path, strange: str, cluster: Path) -> None:
    model, folder = tmp_path / f"{strange}.yaml", tmp_path / strange
    content = (ROOT / "configs" / "models" / "tiny_gpt.yaml").read_text()
    quoted = json.dumps(strange)
    model.write_text(f"{content}\nenvironment: {{STRANGE: {quoted}}}\n")
    text = script(str(model), "lion", "cpu", run=folder, data=f"/data/{strange}", nodes=2)
    assert option(text, "job-name") == f"{strange}-lion-cpu"
    assert option(text, "output").replace("%%", "%") == f"{folder}/log.txt"
    assert option(text, "output").count("%") == 2 * strange.count("%")
    done = run(cluster, 'printf "%s\\n" "$STRANGE" > "$SEEN"', text)
    assert done.returncode == 1, done.stderr  # nothing was saved
    words = (cluster / "srun.log").read_text().splitlines()
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:29542"
    assert words[words.index("--rdzv-id") + 1] == strange
    assert words[words.index("--save") + 1] == f"{folder}/checkpoints"
    assert words[words.index("--train-data-path") + 1] == f"/data/{strange}/train_text_document"
    assert (cluster / "seen").read_text() == f"{strange}\n"


@pytest.mark.parametrize("strange", ["a\nb", "a\rb", "a\\b", "a\tb", "a\u2028b"])
def test_a_name_that_sbatch_would_read_as_something_else_is_refused(tmp_path: Path, strange: str) -> None:
    with pytest.raises(LionError, match=r"^run '.*' cannot be written in a Slurm script: use a name without"):
        script("tiny_gpt", "lion", "cpu", run=strange)
    model = tmp_path / f"{strange}.yaml"
    model.write_text((ROOT / "configs" / "models" / "tiny_gpt.yaml").read_text())
    with pytest.raises(LionError, match=r"^the recipe's name '.*' cannot be written in a Slurm script"):
        script(str(model), "lion", "cpu", run=tmp_path)


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "é", "a$b", "%j"])
@pytest.mark.parametrize("key", ["partition", "account", "time"])
def test_sbatchs_own_options_are_refused_where_they_are_not_plain_words(key: str, value: str) -> None:
    with pytest.raises(
        LionError, match=f"slurm-{key} .* is (not valid for sbatch.s --{key}: use only letters|not a Slurm time limit)"
    ):
        script("tiny_gpt", "lion", "cpu", **{f"slurm-{key}": value})


@pytest.mark.parametrize("name", ["A B", "A;id", "1A", "", "A-B", "A=B", "A\nB", "É"])
def test_a_name_that_no_variable_can_have_is_refused(tmp_path: Path, name: str) -> None:
    model = tmp_path / "own.yaml"
    content = (ROOT / "configs" / "models" / "tiny_gpt.yaml").read_text()
    model.write_text(f"{content}\nenvironment: {{{json.dumps(name)}: x}}\n")
    with pytest.raises(LionError, match=r"environment .* is not the name of a variable: use letters, digits and _"):
        script(str(model), "lion", "cpu")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with stand-ins for scontrol and srun."""
    install(tmp_path)
    return tmp_path


def saves(cluster: Path, iteration: int, place: str = "run/checkpoints") -> str:
    folder = cluster / place
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


def test_checkpoints_in_another_folder_are_found_and_resumed(cluster: Path) -> None:
    text = script("tiny_gpt", "lion", "cpu", run=cluster / "run", save=cluster / "my checkpoints")
    place = str(cluster / "my checkpoints")
    done = run(cluster, f"{saves(cluster, 100, 'my\\ checkpoints')}; exit 143", text)
    assert (done.returncode, (cluster / "scontrol.log").read_text()) == (0, "requeue 42\n"), done.stderr
    words = (cluster / "srun.log").read_text().splitlines()
    assert [words[words.index(flag) + 1] for flag in ("--save", "--load")] == [place, place]
    done = run(cluster, saves(cluster, 300, "my\\ checkpoints"), text)
    assert done.returncode == 0
    assert "done: iteration 300 of 300 is saved" in done.stdout
    assert not (cluster / "run").exists()


EXIT_INTERVAL = {"exit-interval": 100}


@pytest.mark.parametrize(
    ("act", "settings", "is_done"),
    [
        ("{saved}", EXIT_INTERVAL, True),
        ("{saved}; exit 143", EXIT_INTERVAL, False),  # a signal
        ("{saved}", {"exit-interval": 30}, False),  # another reason, such as --exit-duration-in-mins
        ("{saved}", {"exit-interval": 0}, False),
        ("{saved}", {}, False),
    ],
)
def test_a_job_that_ends_at_its_exit_interval_is_done(
    cluster: Path, act: str, settings: dict[str, int], is_done: bool
) -> None:
    text = script("tiny_gpt", "lion", "cpu", run=cluster / "run", **settings)
    done = run(cluster, act.format(saved=saves(cluster, 200)), text)
    assert done.returncode == 0, done.stderr
    assert ("done: iteration 200 of 300 is saved, a multiple of exit-interval 100" in done.stdout) == is_done
    assert (cluster / "scontrol.log").exists() != is_done
    again = run(cluster, "true", text)
    assert again.returncode == 1, "nothing was saved, which is not an end at the interval"


def test_the_exit_interval_may_be_a_flag(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--exit-interval", "1"], ["--exit-interval=1"]):
        words = ["tiny_gpt", "lion", "cpu", f"run={cluster}/run", "--slurm", "--print", "--", *flags]
        assert main.main(words) == 0
        shutil.rmtree(cluster / "run", ignore_errors=True)
        done = run(cluster, saves(cluster, 1), capsys.readouterr().out)
        assert "done: iteration 1 of 300 is saved, a multiple of exit-interval 1" in done.stdout, done.stderr
    assert not (cluster / "scontrol.log").exists()


def test_a_job_that_would_not_resume_what_it_saved_is_not_queued_again(cluster: Path) -> None:
    text = script("tiny_gpt", "lion", "cpu", run=cluster / "run", load=cluster / "other")
    done = run(cluster, f"{saves(cluster, 100)}; exit 143", text)
    assert done.returncode == 143
    assert "not queued again, because it would start from load instead of what it saved. Remove load" in done.stderr
    assert not (cluster / "scontrol.log").exists()
    assert run(cluster, saves(cluster, 300), text).returncode == 0


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
