"""Slurm jobs in containers, and further options of sbatch and srun: what srun gets, and what is refused."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.launcher import main, recipe_checks
from megatron_lion.config import LionError
from tests.launch.recipe_cases import ROOT, recipe
from tests.launch.slurm_stubs import install, run, script, srun_words

SPLITS = ("train", "valid", "test")
IMAGE = "nvcr.io#nvidia/pytorch:25.06-py3"
PYXIS = {"container": "pyxis", "container-image": IMAGE}
APPTAINER = {"container": "apptainer", "container-image": "/images/lion 1.sif"}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for Slurm's commands, outside the checkout, as the current one."""
    install(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def words_of(cluster: Path, **settings: object) -> list[str]:
    """What srun gets for tiny_gpt on two nodes; the script is sound shell and fails, as nothing was saved."""
    settings = {"run": cluster / "run", "data": "/data/text", "nodes": 2, **settings}
    text = script("tiny_gpt", "lion", "cpu", **settings)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "$$" not in text
    done = run(cluster, "exit 3", text)
    assert done.returncode == 3, done.stderr
    return srun_words(cluster)


def test_pyxis_gets_image_mounts_and_folder_as_options_of_srun(cluster: Path) -> None:
    words = words_of(cluster, **PYXIS)
    mounts = [
        f"{path}:{path}" for path in sorted(["/data/text", str(ROOT), str(cluster / "here"), str(cluster / "run")])
    ]
    start = words.index("env")
    assert words[:start] == [
        "--cpus-per-task=2", "--kill-on-bad-exit=1", f"--container-image={IMAGE}",
        f"--container-mounts={','.join(mounts)}", f"--container-workdir={cluster / 'here'}",
    ]  # fmt: skip
    inside = words[start + 1 :]
    assert inside[: inside.index("python3")] == [
        "MEGATRON_LION_DEVICE=cpu", "CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ]  # fmt: skip
    command = inside[inside.index("python3") :]
    assert command[:6] == [
        "python3", f"{ROOT}/launch/kill_hung_launcher.py", "720", "python3", "-m", "torch.distributed.run",
    ]  # fmt: skip
    assert command[command.index("--rdzv-endpoint") + 1] == "node7:29542"
    assert sys.executable not in words


def test_apptainer_runs_the_command_with_its_options(cluster: Path) -> None:
    words = words_of(cluster, **APPTAINER, **{"container-args": "--cleanenv --overlay '/my overlay'"})
    start = words.index("apptainer")
    assert words[:start] == ["--cpus-per-task=2", "--kill-on-bad-exit=1"]
    end = words.index("env")
    assert words[start:end] == [
        "apptainer", "exec", "--bind", words[start + 3], "--pwd", str(cluster / "here"), "--cleanenv", "--overlay",
        "/my overlay", "/images/lion 1.sif",
    ]  # fmt: skip
    assert f"{ROOT}:{ROOT}" in words[start + 3].split(",")
    assert "python3" in words[end:]


def test_a_gpu_is_passed_to_apptainer() -> None:
    assert " apptainer exec --nv --bind " in script("gpt2_small", "lion", "h100x8", **APPTAINER)
    assert " --nv " not in script("tiny_gpt", "lion", "cpu", **APPTAINER)


@pytest.mark.parametrize(
    ("mounts", "missing"),
    [
        ("/data", False),
        ("/data:/data:ro", False),
        ("/data/text:/data/text,/scratch", False),
        ("/data:/mnt/data", True),  # the recipe's paths are those outside
        ("/dat:/dat", True),
        ("/", False),
    ],
)
def test_paths_that_no_mount_covers_are_mounted(cluster: Path, mounts: str, missing: bool) -> None:
    words = words_of(cluster, **PYXIS, **{"container-mounts": mounts})
    given = next(word for word in words if word.startswith("--container-mounts=")).partition("=")[2].split(",")
    assert ("/data/text:/data/text" in given[len(mounts.split(",")) :]) == missing
    assert (f"{ROOT}:{ROOT}" in given) == (mounts != "/")
    assert all(mount.count(":") >= 1 for mount in given)


def srun_line(**settings: object) -> list[str]:
    """The words of the script's srun, without running it."""
    lines = script("tiny_gpt", "lion", "cpu", **settings).splitlines()
    return shlex.split(next(line for line in lines if line.startswith("srun ")))


def mounts_of(**settings: object) -> list[str]:
    (found,) = [word for word in srun_line(**PYXIS, **settings) if word.startswith("--container-mounts=")]
    return found.partition("=")[2].split(",")


@pytest.mark.parametrize(
    ("mount", "data", "added"),
    [
        ("/lustre/me:/data", "/data", False),  # a path inside: it was mounted a second time on /data
        ("/lustre/me:/data", "/data/text", False),
        ("/lustre/me:/data:ro", "/lustre/me/text", True),  # a path outside, which the container has elsewhere
    ],
)
def test_data_in_the_target_of_a_mount_is_not_mounted_again(mount: str, data: str, added: bool) -> None:
    given = mounts_of(**{"container-mounts": mount, "data": data})
    assert (f"{data}:{data}" in given) == added
    assert f"{ROOT}:{ROOT}" in given
    targets = [mount.split(":")[1] for mount in given]
    assert len(set(targets)) == len(targets)


def test_a_folder_of_this_machine_is_mounted_also_inside_the_target_of_a_mount() -> None:
    for target, added in (("/lab/runs", True), ("/lab/runs/1", False)):
        given = mounts_of(run="/lab/runs/1", **{"container-mounts": f"/scratch:{target}"})
        assert ("/lab/runs/1:/lab/runs/1" in given) == added


def test_checkpoints_and_reports_in_other_folders_are_mounted() -> None:
    paths = {
        "save": "/scratch/saved", "load": "/old/checkpoints", "tensorboard-dir": "/lab/boards",
        "norm-ratio-file": "/lab/ratios/a.jsonl",
    }  # fmt: skip
    given = mounts_of(run="/lab/run", **paths)
    for path in ("/lab/run", "/scratch/saved", "/old/checkpoints", "/lab/boards", "/lab/ratios"):
        assert f"{path}:{path}" in given
    # The script reads what is saved from outside. The others may be paths in the target of a mount.
    inside = {"container-mounts": "/a:/scratch,/b:/old,/c:/lab"}
    assert [mount for mount in mounts_of(run="/run", **paths, **inside) if mount.split(":")[0] in paths.values()] == [
        "/scratch/saved:/scratch/saved"
    ]
    off = mounts_of(run="/lab/run", **paths, **{"norm-ratio-interval": 0})
    assert "/lab/ratios:/lab/ratios" not in off


def test_folders_that_a_container_mounts_are_made_before_the_job(cluster: Path) -> None:
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\n")
    paths = {"save": "saved", "tensorboard-dir": "boards/a", "norm-ratio-file": "ratios/a.jsonl", "run": "run"}
    settings = [f"{key}={cluster}/{path}" for key, path in paths.items()] + [f"{k}={v}" for k, v in PYXIS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{cluster}/bin")
        (cluster / "bin" / "sbatch").chmod(0o755)
        assert main.submit(recipe("tiny_gpt", "lion", "cpu", *settings), [], "python3") == 0
    for folder in ("saved", "boards/a", "ratios", "run"):
        assert (cluster / folder).is_dir()


def test_files_are_looked_for_where_a_mount_has_them(tmp_path: Path) -> None:
    for name in ("tokenizer.model", *(f"{split}_text_document.{end}" for split in SPLITS for end in ("bin", "idx"))):
        (tmp_path / name).write_text("x")
    mounts = {"container-mounts": f"{tmp_path}:/text", "data": "/text"}
    settings = [f"{key}={value}" for key, value in (PYXIS | mounts).items()]
    assert recipe_checks.missing_files(recipe("tiny_gpt", "lion", "cpu", *settings)) == []
    (tmp_path / "valid_text_document.bin").unlink()
    assert recipe_checks.missing_files(recipe("tiny_gpt", "lion", "cpu", *settings)) == [
        "valid-data-path: /text/valid_text_document.bin"
    ]


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_an_image_file_is_passed_with_its_whole_path(cluster: Path, container: str) -> None:
    """pyxis takes ``images/lion.sqsh`` for an image of a registry."""
    (cluster / "here" / "lab.images" / "sandbox").mkdir(parents=True)
    for image in ("lab.images/lion.sqsh", "lab.images/lion.sif", "lab.images/sandbox", "~/lion.sif"):
        words = srun_line(**{"container": container, "container-image": image})
        whole = str(cluster / "here" / Path(image).expanduser())
        assert f"--container-image={whole}" in words or whole in words


def test_workdir_python_and_options_of_srun_are_the_users(cluster: Path) -> None:
    words = words_of(
        cluster,
        **PYXIS,
        **{"container-workdir": "/workspace", "slurm-python": "/opt/venv/bin/python"},
        **{"slurm-srun-args": "--mpi=pmix --export=ALL,A='b c'", "container-args": "--no-container-mount-home"},
    )
    assert words[2:4] == ["--mpi=pmix", "--export=ALL,A=b c"]
    assert "--container-workdir=/workspace" in words
    assert words[words.index("env") - 1] == "--no-container-mount-home"
    assert words.count("/opt/venv/bin/python") == 2  # the watcher's and torchrun's
    without = words_of(cluster, **{"slurm-python": "/opt/venv/bin/python"})
    assert without[2] == "/opt/venv/bin/python"


def test_options_of_sbatch_are_written() -> None:
    text = script(
        "gpt2_small", "lion", "h100x8",
        **{"slurm-qos": "high", "slurm-constraint": "[rack1|rack2]&nvlink", "slurm-exclusive": "true"},
        **{"slurm-sbatch-args": "--mail-type=END --comment='my run' --reservation r1"},
    )  # fmt: skip
    for line in (
        "--qos=high", "--constraint='[rack1|rack2]&nvlink'", "--exclusive",
        "--mail-type=END '--comment=my run' --reservation r1",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert "--exclusive" not in script("gpt2_small", "lion", "h100x8", **{"slurm-exclusive": "false"})


REFUSED = {
    "container=docker": "container 'docker' is unknown: Valid: apptainer, pyxis",
    "container=pyxis": "container pyxis needs container-image: a file (.sqsh for pyxis, .sif for apptainer)",
    "container-image=a": "container-image has no effect without container: set container to pyxis or apptainer",
    "container=pyxis container-image=nvcr.io/nvidia/pytorch:25": "use nvcr.io#nvidia/pytorch:25, or a file",
    "container=apptainer container-image=reg.lab:5000/lion:1": "use docker://reg.lab:5000/lion:1, or a file",
    "container=pyxis container-image=a container-mounts=data:/data": "'data:/data' is not a mount. Use SOURCE:TARGET",
    "container=pyxis container-image=a container-mounts=/a:/b:ro:x": "'/a:/b:ro:x' is not a mount",
    "container=pyxis container-image=a container-mounts=/a:/d,/b:/d:ro": "has two mounts on /d: remove one",
    "container=pyxis container-image=lab.images/lion": "use lab.images#lion, or a file",
    "container=pyxis container-image=a container-mounts=/a:b": "'/a:b' is not a mount",
    "container=pyxis container-image=a container-workdir=x": "container-workdir 'x' is not absolute: start it with /",
    "container=pyxis container-image=a container-args=x": "container-args 'x' does not start with an option",
    "slurm-srun-args='": 'slurm-srun-args "\'" cannot be split into words: No closing quotation',
    "slurm-srun-args=--container-image=x": "slurm-srun-args has --container-image, which the script sets itself: set "
    "container-image instead",
    "slurm-sbatch-args=--nodes=3": "slurm-sbatch-args has --nodes, which the script sets itself: set nodes instead",
    "slurm-sbatch-args=--requeue": "slurm-sbatch-args has --requeue, which the script sets itself: remove it",
    "slurm-qos=a;b": "slurm-qos 'a;b' is not valid for sbatch's --qos: use only letters, digits and -_.:,",
    "slurm-constraint=$x": "slurm-constraint '$x' is not valid for sbatch's --constraint: use only letters",
    "slurm-exclusive=maybe": "slurm-exclusive on the command line must be true or false, got 'maybe'",
    "slurm-python=": "slurm-python is empty: use python3, or the path of a Python",
}


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_bad_values_are_refused_with_key_and_value(settings: str) -> None:
    with pytest.raises(LionError) as error:
        recipe("tiny_gpt", "lion", "cpu", *settings.split(" "))
    assert REFUSED[settings] in str(error.value)


def test_a_path_that_cannot_be_mounted_is_refused(cluster: Path) -> None:
    with pytest.raises(LionError, match=r"/data/a,b cannot be mounted in a container: rename it without commas"):
        script("tiny_gpt", "lion", "cpu", data="/data/a,b", **PYXIS)


def test_print_shows_the_script_and_writes_nothing(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tiny_gpt",
        "lion",
        "cpu",
        "weight-decay=0.7",
        f"run={cluster}/run",
        "--slurm",
        "--print",
        *(f"{k}={v}" for k, v in PYXIS.items()),
    ]
    assert main.main(words) == 0
    shown, notes = capsys.readouterr()
    assert notes == ""
    assert shown.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=tiny_gpt-lion-cpu\n")
    assert f"srun --cpus-per-task=2 --kill-on-bad-exit=1 '--container-image={IMAGE}'" in shown
    assert not (cluster / "run").exists()
    assert list((cluster / "here").iterdir()) == []
