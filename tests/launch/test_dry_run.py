"""launch.py's dry run and its command line: recipes of one sweep, notes, sources, costs, flags after ``--``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.launcher import estimates, extra_flags, main, report
from launch.launcher.keys import KEYS
from megatron_lion.config import LionError
from tests.launch.recipe_cases import ROOT, recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without the variable that other tests set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGATRON_LION_DEVICE", raising=False)
    return tmp_path


def dry_run(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    words = line.split()
    words.insert(words.index("--") if "--" in words else len(words), "--dry-run")
    assert main.main(words) == 0
    return capsys.readouterr().out


# ---- the recipes' values ----

# Wen et al. (2025), 20 tokens per non-embedding parameter: lr, weight decay, sequences in a batch.
SWEEP = {
    ("llama_130m", "lion"): (1e-3, 0.7, 128),
    ("llama_130m", "adamw"): (8e-3, 0.1, 128),
    ("llama_300m", "lion"): (1e-3, 0.6, 128),
    ("llama_300m", "adamw"): (8e-3, 0.1, 128),
    ("llama_520m", "lion"): (1e-3, 0.7, 128),
    ("llama_520m", "adamw"): (4e-3, 0.2, 256),
    ("llama_1b", "adamw"): (2e-3, 0.2, 256),
}
NON_EMBEDDING = {"llama_130m": 134217728, "llama_300m": 301989888, "llama_520m": 536870912, "llama_1b": 1207959552}


@pytest.mark.parametrize("case", SWEEP, ids=" ".join)
def test_the_sweeps_recipes_have_its_rates_its_models_and_its_tokens(case: tuple[str, str]) -> None:
    found = recipe(*case, "h100x8")
    assert (found["lr"], found["weight-decay"], found["global-batch-size"]) == SWEEP[case]
    assert (found["min-lr"], found["clip-grad"], found["seq-length"]) == (0.0, 1.0, 4096)
    norms, tables = (2 * 32 + 1) * found["hidden-size"], 2 * 128_256 * found["hidden-size"]
    assert estimates.total_parameters(found) - norms - tables == NON_EMBEDDING[case[0]]
    tokens = found["train-iters"] * found["global-batch-size"] * 4096
    assert tokens == pytest.approx(20 * NON_EMBEDDING[case[0]], rel=1e-2)
    assert found["lr-decay-iters"] == found["train-iters"] > found["lr-warmup-iters"]


def test_llama_7b_has_the_parameters_of_llama_2() -> None:
    assert estimates.total_parameters(recipe("llama_7b", "lion", "h100x8")) == 6_738_415_616


@pytest.mark.parametrize("model", ["gpt2_small", "gpt2_medium", "llama_130m", "llama_300m", "llama_520m", "llama_1b"])
def test_a_first_comparison_is_fair(model: str) -> None:
    """The same tokens and schedule; lr 4 to 8 times lower, weight decay 3.5 to 7 times higher, as the sweep found."""
    lion, adamw = recipe(model, "lion", "h100x8"), recipe(model, "adamw", "h100x8")
    assert 4 <= adamw["lr"] / lion["lr"] <= 8
    assert 3.49 < lion["weight-decay"] / adamw["weight-decay"] < 7.01
    assert lion["train-iters"] * lion["global-batch-size"] == adamw["train-iters"] * adamw["global-batch-size"]
    for key in ("min-lr", "clip-grad", "lr-decay-style", "hidden-dropout", "seed"):
        assert lion[key] == adamw[key]


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
@pytest.mark.parametrize("cluster", ["h100x8", "h100x32"])
@pytest.mark.parametrize(("model", "tokens"), [("llama_1b", "24 billion"), ("llama_7b", "134 billion")])
def test_large_recipes_fit_and_say_that_they_are_extrapolated(
    model: str, tokens: str, cluster: str, optimizer: str
) -> None:
    found = recipe(model, optimizer, cluster)
    assert estimates.memory(found).total < 0.6 * 80 * 2**30
    notes = " ".join(found.notes)
    assert f"OpenWebText has about 9 billion tokens, too few for this run of {tokens}" in notes
    assert ("extrapolated" in notes) == (optimizer == "lion")


@pytest.mark.parametrize("model", ["bert_small", "bert_base"])
def test_lion_for_bert_says_that_there_is_no_sweep_and_takes_rates_of_your_own(model: str) -> None:
    with pytest.raises(LionError, match=r"does not set lr, weight-decay: .* No published sweep tunes Lion for BERT"):
        recipe(model, "lion", "h100x8")
    assert recipe(model, "lion", "h100x8", "lr=2e-5", "min-lr=0", "weight-decay=0.05")["lr"] == 2e-5


# ---- the report ----


def test_a_dry_run_groups_settings_by_topic_with_their_sources(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = dry_run("llama_7b lion h100x32 seed=7", capsys)
    topics = [line for line in shown.splitlines() if line and line[0] not in " #C" and ":" not in line]
    assert topics == [
        "recipe llama_7b lion h100x32", "run", "cluster", "slurm", "model", "data", "optimizer", "schedule and batch",
        "parallelism", "precision and kernels", "checkpoints and logs", "environment", "estimates",
        "missing or empty on this machine",
    ]  # fmt: skip
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert rows["num-layers"].split() == ["num-layers", "32", "model:", "[H]"]
    assert "sources in brackets: " in shown
    assert rows["lr"].endswith("model, with lion: [ours] extrapolated: Llama 2's 3e-4 / 3; [C] used 1e-4 at 7.5B")
    assert rows["seed"].endswith("command line (instead of 1234)")
    assert shown.count("note: ") == 2
    assert "6,738,415,616, vocabulary 32,000" in shown
    assert "29.04 GiB of 80 GiB" in rows["memory"]
    assert rows["train-data-path:"].endswith(f"{folder}/data/corpus_train_text_document.bin and .idx")
    assert shown.count(" --nnodes 4 ") == 1, "the same line of four nodes is shown once"
    assert list(folder.iterdir()) == []


def test_hours_are_the_models_operations_over_the_clusters_peak(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """6 operations for each parameter and token, and those of attention: 7B on 134 billion tokens."""
    found = recipe("llama_7b", "lion", "h100x32")
    hours = estimates.hours(found, 0.4)
    assert hours is not None
    tokens = 32_000 * 1024 * 4096
    by_hand = tokens * (6 * (6_738_415_616 - 32_000 * 4096) + 6 * 32 * 4096 * 4096) / (32 * 0.4 * 989e12) / 3600
    assert hours == pytest.approx(by_hand, rel=1e-3)
    assert "14.2 s a step, 126 hours, 4,040 GPU-hours" in dry_run("llama_7b lion h100x32", capsys)
    assert estimates.hours(recipe("tiny_gpt", "lion", "cpu"), 0.4) is None


# ---- flags after -- ----


def test_a_recipes_key_after_the_dashes_is_an_override_that_is_checked_and_shown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = dry_run("gpt2_small lion h100x8 -- --lr 3e-4 --log-params-norm --micro-batch-size=4", capsys)
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert rows["lr"].endswith("command line (instead of 0.0005)")
    assert rows["micro-batch-size"].endswith("command line (instead of 8)")
    assert "further flags\n  --log-params-norm\n" in shown
    command = shown.rstrip().splitlines()[-1]
    assert command.count("--lr ") == 1
    assert " --lr 0.0003 " in command
    assert command.endswith(" --log-params-norm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--min-lr 1", "min-lr 1 is greater than lr 0.0005"),
        ("--lr", "--lr after -- takes one value, got none"),
        ("--lr 1 2", "--lr after -- takes one value, got 1 2"),
        ("--bf16 true", "--bf16 after -- takes no value, got true"),
        ("--lr fast", "lr on the command line must be a number, got 'fast'"),
        ("--train_iters 5", "unknown flag --train_iters after --: did you mean 'train-iters'?"),
        ("--log-param-norm", "unknown flag --log-param-norm after --: did you mean 'log-params-norm'?"),
        ("--xyzzyx", "unknown flag --xyzzyx after --: launch/pretrain_gpt.py --help lists Megatron's flags"),
        ("5 --lr 1", "'5' after -- is not a flag"),
    ],
)
def test_flags_after_the_dashes_are_checked(folder: Path, flags: str, message: str) -> None:
    with pytest.raises(LionError) as error:
        main.main(["gpt2_small", "lion", "h100x8", "--dry-run", "--", *flags.split()])
    assert message in str(error.value)


def test_without_megatron_the_names_are_not_checked_and_the_dry_run_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extra_flags, "_folder", lambda: None)
    shown = dry_run("gpt2_small lion h100x8 -- --log-param-norm", capsys)
    assert "further flags (names not checked: Megatron is not installed here)\n  --log-param-norm\n" in shown


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("llama_130m lion h100x8 lr=1", "warning: --lr 1 is far above Lion's published rates"),
        ("llama_130m lion h100x8 -- --lr 8e-3 --weight-decay 0.1", "warning: --lr 0.008 with --weight-decay 0.1 looks"),
        ("llama_130m lion h100x8", ""),
        ("llama_130m adamw h100x8", ""),
    ],
)
def test_a_rate_that_the_run_warns_about_is_in_the_dry_run_and_before_a_job_is_submitted(
    folder: Path, line: str, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = dry_run(line, capsys)
    assert ("warning" in shown, warning in shown) == (bool(warning), True)
    names, _, flags = line.partition(" -- ")
    main.main([*names.split(), "--slurm", "--print", *(["--", *flags.split()] if flags else [])])
    assert ("warning" in (said := capsys.readouterr().err), warning in said) == (bool(warning), True)


# ---- the command line ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected MODEL OPTIMIZER CLUSTER, got nothing: for example tiny_gpt lion cpu"),
        ("tiny_gpt lion", "expected MODEL OPTIMIZER CLUSTER, got tiny_gpt lion:"),
        ("tiny_gpt lion lr=1", "expected MODEL OPTIMIZER CLUSTER, got tiny_gpt lion lr=1:"),
        ("tiny_gpt lion cpu --dryrun", "unrecognized arguments: --dryrun: did you mean '--dry-run'?"),
        ("tiny_gpt lion cpu --dry-run --slurm", "use --slurm --print"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(line: str, message: str) -> None:
    with pytest.raises(LionError) as error:
        main.main(line.split())
    assert message in str(error.value)


def test_help_names_every_file_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main.main(["--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    for word in ("usage: launch.py MODEL", "llama_7b", "h100x32", "lion_paper", "--slurm --print"):
        assert word in shown
    assert [key for key in KEYS if key not in shown] == []


def test_the_cpu_variable_is_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It sets the flags and variables for a run here; a Slurm job runs elsewhere, and device= decides."""
    monkeypatch.setenv("MEGATRON_LION_DEVICE", "cpu")
    shown = dry_run("tiny_gpt lion one_gpu", capsys)
    command = shown.rstrip().splitlines()[-1]
    for word in (
        "MEGATRON_LION_DEVICE=cpu",
        "CUDA_VISIBLE_DEVICES=''",
        "--distributed-backend gloo",
        "--no-rope-fusion",
    ):
        assert word in command
    assert "--transformer-impl local" in command
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert rows["transformer-impl"].endswith("device=cpu (instead of transformer_engine)")
    assert "--distributed-backend nccl" in dry_run("tiny_gpt lion one_gpu device=cuda", capsys)
    assert main.main(["tiny_gpt", "lion", "one_gpu", "--slurm", "--print"]) == 0
    assert "--distributed-backend nccl" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--dry-run", "--print"])
def test_a_reader_that_wants_only_the_first_lines_is_no_error(option: str) -> None:
    """launch.py ... --dry-run | head"""
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "launch/launch.py", "tiny_gpt", "adamw", "cpu", option]
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_three_digits() -> None:
    assert [report._three_digits(value) for value in (0.0944, 2.3, 126.2, 4039.6)] == ["0.0944", "2.3", "126", "4,040"]


def test_notes_are_shown_beside_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--print"], ["--print", "--slurm"]):
        assert main.main(["llama_7b", "lion", "h100x32", *words]) == 0
        shown, notes = capsys.readouterr()
        assert notes.count("note: ") == 2
        assert "note: " not in shown
