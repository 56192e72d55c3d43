"""Recipe files: values are the text as written, tables and keys are checked, paths hold from any folder."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from launch.launcher import commands, recipe_checks, recipe_files, recipes, slurm
from megatron_lion.config import LionError
from tests.launch.recipe_cases import ROOT

LAUNCH = ROOT / "launch" / "launch.py"


def with_cluster(folder: Path, more: str) -> recipes.Recipe:
    """tiny_gpt with Lion on the cluster cpu, with lines added to the cluster's file."""
    own = folder / "own.yaml"
    text = (recipe_files.CONFIGS / "clusters" / "cpu.yaml").read_text()
    if more.startswith("environment:"):
        text = text[: text.index("environment:")]
    key = more.split(":")[0]
    own.write_text("".join(line for line in text.splitlines(True) if not line.startswith(f"{key}:")) + more + "\n")
    return recipes.resolve("tiny_gpt", "lion", str(own), [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slurm-time: 12:30:00", "12:30:00"),  # YAML 1.1: 45000, to base 60
        ("slurm-time: 1-12:00:00", "1-12:00:00"),
        ("slurm-time: 90", "90"),
        ("slurm-account: 0755", "0755"),  # YAML 1.1: 493, octal
        ("slurm-account: 1e3", "1e3"),
        ("slurm-account: 2024-05-01", "2024-05-01"),  # YAML: a date
        ("slurm-partition: on", "on"),  # YAML 1.1: True
        ("slurm-partition: no", "no"),
        ("slurm-partition: 1_000", "1_000"),
        ("master-address: 0x10", "0x10"),
        ("slurm-setup: =", "="),
        ("master-port: 1_000", 1000),
        ("bf16: no", False),
        ("exit-signal-handler: yes", True),
    ],
)
def test_a_value_is_the_text_as_written_whatever_yaml_makes_of_it(tmp_path: Path, line: str, expected: object) -> None:
    assert with_cluster(tmp_path, line)[line.split(":")[0]] == expected


def test_the_environment_holds_texts_as_written(tmp_path: Path) -> None:
    lines = [
        "environment:",
        "NCCL_IB_DISABLE: on",
        "UMASK: 0022",
        "A: 1:30",
        "B: ~/x",
        'EMPTY: ""',
        "off: 1",
        "N: 'null'",
    ]
    found = with_cluster(tmp_path, "\n  ".join(lines))
    expected = {"NCCL_IB_DISABLE": "on", "UMASK": "0022", "A": "1:30", "B": "~/x", "EMPTY": "", "off": "1", "N": "null"}
    assert found.environment == expected


WRONG_FILES = {
    "an empty environment": ("environment:", "environment in .*own.yaml must hold one table .* got nothing"),
    "an environment that is a list": ("environment: [A, B]", "environment .* must hold one table .* got a list"),
    "a variable without a value": ("environment:\n  A:", 'A must be a text, got nothing; "" is an empty one'),
    "a variable that is a table": ("environment:\n  A: {B: 1}", "A must be a text, got a dict"),
    "a name that no variable has": ("environment:\n  A B: 1", "environment 'A B' .* is not the name of a variable"),
    "a key without a value": ("slurm-partition:", "slurm-partition .* must be a text, got None"),
    "a key that is null": ("slurm-partition: null", "slurm-partition .* must be a text, got None"),
    "a list for a number": ("slurm-cpus: [1]", "slurm-cpus .* must be a whole number"),
    "a time for a number": ("slurm-cpus: 1:30", "slurm-cpus .* must be a whole number, got '1:30'"),
    "a number with a comma": ("slurm-cpus: 1,000", "slurm-cpus .* must be a whole number, got '1,000'"),
    "a key twice": ("slurm-cpus: 1\nslurm-cpus: 2", r"own.yaml: slurm-cpus is set on line \d+ and on line \d+"),
    "a variable twice": ("environment:\n  A: 1\n  A: 2", r"own.yaml: A is set on line \d+ and on line \d+: keep one"),
    "a key twice in one line": ("environment: {A: 1, A: 1}", r"A is set on line \d+ and on line \d+"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_says_nothing_clear_is_refused(tmp_path: Path, name: str) -> None:
    lines, message = WRONG_FILES[name]
    with pytest.raises(LionError, match=message) as error:
        with_cluster(tmp_path, lines)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("with:", "with in .* must hold one table .* got nothing"),
        ("with: [lion]", "with in .* must hold one table .* got a list"),
        ("with:\n  lion:", "with: lion in .* must hold one table .* got nothing"),
        ("with:\n  lion: {lr: 1}\n  lion: {lr: 2}", r"lion is set on line 2 and on line 3"),
        ("with:\n  lion: {lr: 1, lr: 2}", "lr is set on line 2"),
        ("with:\n  sgd: {lrr: 1}", "unknown key 'lrr' in .* with sgd"),  # also where another optimizer is chosen
    ],
)
def test_a_models_own_settings_are_checked_too(tmp_path: Path, lines: str, message: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"{lines}\n")
    with pytest.raises(LionError, match=message):
        recipes.resolve(str(own), "lion", "cpu", [])


def test_a_file_may_begin_with_a_byte_order_mark_and_merge_tables(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("\ufeffwith:\n  sgd: &slow {lr: 2e-3}\n  lion: {<<: *slow, min-lr: 1e-9}\n", encoding="utf-8")
    found = recipes.resolve(str(own), "lion", "cpu", [])
    assert (found["lr"], found["min-lr"]) == (2e-3, 1e-9)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("12:30:00", 45000), ("1-12", 129600), ("1-12:30", 131400),
        ("2-00:00:01", 172801), ("0", math.inf), ("UNLIMITED", math.inf), ("infinite", math.inf),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: float) -> None:
    assert slurm.seconds(text) == seconds
    recipe_checks.check(recipes.resolve("tiny_gpt", "lion", "cpu", [f"slurm-time={text}"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "slurm-time 5 is not more than the 600 seconds before its end"),  # SIGTERM would come at once
        ("10:00", "slurm-time 10:00 is not more"),
        ("0-00:10", "slurm-time 0-00:10 is not more"),
        ("1h", "'1h' is not a Slurm time limit: use one like"),
        ("1:2:3:4", "is not a Slurm time limit"),
        ("", "is not a Slurm time limit"),
    ],
)
def test_a_time_limit_that_leaves_no_time_is_refused(text: str, message: str) -> None:
    with pytest.raises(LionError, match=message):
        recipe_checks.check(recipes.resolve("tiny_gpt", "lion", "cpu", [f"slurm-time={text}"]))


# ---- paths ----


def test_home_and_relative_paths_are_the_same_for_the_check_and_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for name in ("train", "valid", "test"):
        for suffix in ("bin", "idx"):
            (text / f"{name}_text_document.{suffix}").write_text("x")
    (text / "tokenizer.model").touch()
    for data, run in (("~/text", "~/runs/a"), ("text", "runs/a"), ("{run}/../../text", f"{tmp_path}/runs/a")):
        found = recipes.resolve("tiny_gpt", "lion", "cpu", [f"data={data}", f"run={run}"])
        (tmp_path / "runs" / "a").mkdir(parents=True, exist_ok=True)
        recipe_checks.check_files(found)
        flags = commands.training_flags(found, [])
        for flag, end in (
            ("--train-data-path", "text/train_text_document"),
            ("--tokenizer-model", "text/tokenizer.model"),
            ("--save", "runs/a/checkpoints"),
            ("--norm-ratio-file", "runs/a/norm_ratio.jsonl"),
        ):
            path = Path(flags[flags.index(flag) + 1])
            assert path.is_absolute() and path.resolve() == tmp_path / end


def test_a_tokenizers_folder_is_there(tmp_path: Path) -> None:
    found = recipes.resolve("tiny_gpt", "lion", "cpu", [f"data={tmp_path}", f"tokenizer-model={tmp_path}"])
    assert [line for line in recipe_checks.missing_files(found) if "tokenizer-model" in line] == []


def test_only_data_and_run_are_replaced(tmp_path: Path) -> None:
    setup = "source ${HOME}/env/bin/activate; x=${run}; echo {x} {run}/y"
    found = recipes.resolve("tiny_gpt", "lion", "cpu", [f"slurm-setup={setup}", f"run={tmp_path}"])
    assert found["slurm-setup"] == f"source ${{HOME}}/env/bin/activate; x=${{run}}; echo {{x}} {tmp_path}/y"
    odd = recipes.resolve("tiny_gpt", "lion", "cpu", ["data=/a{b}"])
    assert odd["train-data-path"] == "/a{b}/train_text_document"
    nested = recipes.resolve("tiny_gpt", "lion", "cpu", ["data={run}/text", "run=/r"])
    assert nested["train-data-path"] == "/r/text/train_text_document"


@pytest.mark.parametrize("how", ["--print", "--slurm"])
def test_a_job_reads_and_writes_where_it_was_submitted(tmp_path: Path, how: str) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in ("train_text_document", "valid_text_document", "test_text_document"):
        for suffix in ("bin", "idx"):
            (text / f"{name}.{suffix}").write_text("x")
    (text / "tokenizer.model").touch()
    words = ["tiny_gpt", "lion", "cpu", how, "data=text", "run=runs/a", "--", "--wandb-save-dir", "wandb"]
    done = subprocess.run([sys.executable, str(LAUNCH), *words], capture_output=True, text=True, cwd=tmp_path)
    script = done.stdout if how == "--print" else (tmp_path / "runs" / "a" / "job.sh").read_text()
    for path in ("text/train_text_document", "runs/a/checkpoints"):
        assert f" {tmp_path}/{path}" in script
    assert f" {ROOT}/launch/pretrain_gpt.py " in script
    if how == "--slurm":
        assert f"\ncd {tmp_path}\n" in script
        assert f"#SBATCH --output={tmp_path}/runs/a/log.txt" in script
