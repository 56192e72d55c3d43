"""Start real Megatron runs on gloo ranks and read what they leave behind."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_lion.integration.training_log import TrainingLog

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN_GPT = ROOT / "launch" / "pretrain_gpt.py"
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
BATCH = (
    "--micro-batch-size 2 --global-batch-size 8 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1"
)
RATE = "--lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --weight-decay 0.1"
CPU = (
    "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion --no-rope-fusion "
    "--no-persist-layer-norm --no-masked-softmax-fusion"
)
# Also on a machine with a GPU, which the CPU backend would otherwise refuse to hide.
CPU_ENVIRONMENT = {"MEGATRON_LION_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# Without dropout, whose draws differ with the layout, two layouts compute the same function.
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
# A start and a resume must give the scheduler the same horizon, whatever --train-iters says.
HORIZON = "--lr-decay-iters 20"


@dataclass
class Run:
    """A finished run: its exit status, its whole output and what that output reports."""

    returncode: int
    output: str
    log: TrainingLog

    def ours(self) -> list[str]:
        """The lines that this package printed."""
        return [line for line in self.output.splitlines() if line.startswith("megatron-lion:")]


def text_flags(text: Path) -> str:
    """Megatron's flags for the corpus that the ``text`` fixture made."""
    splits = " ".join(f"--{split}-data-path {text}/{split}_text_document" for split in ("train", "valid", "test"))
    return f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {text}/tokenizer.model {splits}"


def torchrun(
    *flags: str,
    ranks: int = 1,
    script: Path | str = PRETRAIN_GPT,
    environment: dict[str, str] | None = None,
    kill_at: int | None = None,
    timeout: float = 300.0,
) -> Run:
    """Run ``script`` under torchrun on ``ranks`` gloo ranks; each of ``flags`` is split at blanks.

    With ``kill_at``, the launcher and every rank are SIGKILLed as soon as that iteration is logged. A run that is
    still going after ``timeout`` seconds is killed too, and fails.
    """
    target = ["-m", script[3:]] if isinstance(script, str) and script.startswith("-m ") else [str(script)]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *target]
    line += [word for flag in flags for word in flag.split()]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **CPU_ENVIRONMENT, **(environment or {})},
    )
    assert process.stdout is not None
    deadline, output, log = time.monotonic() + timeout, [], TrainingLog()
    for text in process.stdout:
        output.append(text)
        iteration = log.add_line(text)
        if (iteration is not None and iteration == kill_at) or time.monotonic() > deadline:
            for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
                victim.kill()
    return Run(process.wait(), "".join(output), log)


def pretrain(text: Path, *flags: str, ranks: int = 1, **kwargs: Any) -> Run:
    """:func:`torchrun` of the tiny GPT on real text; fails where the run does, unless it was to be killed."""
    run = torchrun(MODEL, BATCH, RATE, CPU, text_flags(text), *flags, ranks=ranks, **kwargs)
    if kwargs.get("kill_at") is None:
        assert run.returncode == 0, run.output[-6000:]
    return run


def read_checkpoint(folder: Path, iteration: int) -> dict[str, Tensor]:
    """Every tensor of a ``torch_dist`` checkpoint, whole, by its key; read without Megatron and without ranks."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = FileSystemReader(folder / f"iter_{iteration:07d}")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return dict(_tensors(state))


def _tensors(state: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value


def assert_same_checkpoint(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Both hold the same tensors, bit for bit."""
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, f"{len(different)} of {len(one)} tensors differ: {different[:5]}"


def relative_difference(one: TrainingLog, other: TrainingLog) -> float:
    """The largest relative difference between two runs' losses, at the iterations that both logged.

    The second logged loss after a start is left out: Megatron logs there the mean of the first two.
    """
    shared = sorted(one.loss.keys() & other.loss.keys())
    compared = shared[:1] + shared[2:]
    assert len(compared) >= 2, f"only {shared} were logged by both runs"
    return max(abs(one.loss[i] - other.loss[i]) / abs(one.loss[i]) for i in compared)
