"""MEGATRON_LION_DEVICE=cpu sets the flags that a CPU needs; without it and without a GPU, scripts end with one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lion.integration.cpu import run_flags
from tests.harness import BATCH, CPU, MODEL, RATE, ROOT, Run, run_ranks, text_flags


def train(text: Path, *flags: str) -> Run:
    run = run_ranks(MODEL, BATCH, RATE, text_flags(text), "--optimizer lion --train-iters 3", *flags)
    assert run.returncode == 0, run.output[-3000:]
    return run


def arguments(run: Run) -> dict[str, str]:
    """Megatron's arguments as it prints them at the start."""
    lines = (line.split() for line in run.output.splitlines() if " ..." in line)
    return {words[0]: " ".join(words[2:]) for words in lines if len(words) > 2 and set(words[1]) == {"."}}


def test_the_variable_sets_what_the_flags_set(text: Path) -> None:
    without, given = train(text), train(text, CPU)
    assert without.log.loss == given.log.loss
    assert len(arguments(given)) > 500
    assert arguments(without) == arguments(given)
    assert {arguments(given)[name] for name, _ in run_flags.SETTINGS.values()} >= {"gloo", "local"}
    said = f"megatron-lion: MEGATRON_LION_DEVICE=cpu sets {' '.join(run_flags.SETTINGS)}"
    assert said in without.ours()
    assert said not in given.ours()


def start(*line: object) -> subprocess.CompletedProcess[str]:
    """Run Python without a GPU and without the variable."""
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_LION_DEVICE"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, line)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.parametrize(
    "line",
    [
        "launch/pretrain_gpt.py --optimizer sgd --lr 0.1",
        "launch/pretrain_bert.py --optimizer lion --lr 1e-4",
        "tools/eval_wikitext103.py --checkpoints missing --text missing",
        pytest.param("-m tools.benchmark.norm_ratio_round --optimizer lion", marks=pytest.mark.slow),
        pytest.param(
            f"-m megatron_lion.run {{script}} {MODEL} {BATCH} {RATE} --optimizer lion --mock-data",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_without_a_gpu_and_the_variable_a_script_ends_with_one_line(line: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from megatron.training.arguments import parse_args, validate_args\nvalidate_args(parse_args(), {})\n"
    )
    first, *rest = line.format(script=script).split()
    result = start(ROOT / first if first.endswith(".py") else first, *rest)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]  # behind what torch and Megatron say at their import
    assert error.startswith("megatron-lion: error: no GPU is visible to torch ")
    assert "Set MEGATRON_LION_DEVICE=cpu to train on the CPU" in error
