"""Start real Megatron runs on gloo ranks and read what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from megatron_lion.integration.cpu import run_flags
from megatron_lion.training_log import TrainingLog
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN_GPT = ROOT / "launch" / "pretrain_gpt.py"
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
BATCH = (
    "--micro-batch-size 2 --global-batch-size 8 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1"
)
RATE = "--lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --weight-decay 0.1"
CPU = run_flags.FLAGS
CPU_ENVIRONMENT = {**run_flags.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
# The server that ranks are forked from inherits it, and a thread count is read when torch is loaded.
os.environ.update(CPU_ENVIRONMENT)
# Without dropout, whose draws differ with the layout, two layouts compute the same function.
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
# Processes that read data, in every run that is killed or gets a signal: they get it too.
WORKERS = "--num-workers 2"
# Without the other two flags Megatron from 0.17 on only warns, and saves as usual.
ASYNC_SAVE = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
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
    kill_rank: int | None = None,
    launcher: str = "",
    timeout: float = 300.0,
) -> Run:
    """Run ``script`` under torchrun on ``ranks`` gloo ranks; each of ``flags`` is split at blanks.

    With ``kill_at``, the launcher and every rank, or ``kill_rank`` alone, are SIGKILLed as soon as that iteration is
    first logged. A run that is still going after ``timeout`` seconds is killed too, and fails. ``launcher`` has further
    flags of torchrun's own.
    """
    target = ["-m", script[3:]] if isinstance(script, str) and script.startswith("-m ") else [str(script)]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*line, *launcher.split(), *target, *_words(flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **CPU_ENVIRONMENT, **(environment or {})},
    )
    assert process.stdout is not None

    def kill(rank: int | None = None) -> None:
        children = psutil.Process(process.pid).children(recursive=True)
        chosen = [child for child in children if child.environ().get("RANK") == str(rank)]
        for victim in [*children, process] if rank is None else chosen:
            victim.kill()

    output, log = _follow(process.stdout, kill, Kill(kill_at, rank=kill_rank), timeout)
    return Run(process.wait(), output, log)


def as_in_a_terminal() -> None:
    """For Popen's ``preexec_fn``: a process group of its own, in which Ctrl-C and a hangup end a process.

    A shell's background job ignores the first, and one under nohup the second; both are inherited.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run_ranks(
    *flags: str,
    ranks: int = 1,
    script: Path = PRETRAIN_GPT,
    environment: dict[str, str] | None = None,
    kill_at: int | None = None,
    kill_rank: int | None = None,
    kill_after: float = 0.0,
    timeout: float = 300.0,
) -> Run:
    """As :func:`torchrun`, with ranks that start at once (``ranks.py``) and no launcher around them.

    The kill comes ``kill_after`` seconds after iteration ``kill_at``; a run that has ended by then ends well.
    """
    if os.environ.get("MEGATRON_LION_TESTS_TORCHRUN") and kill_rank is None and not kill_after:
        return torchrun(*flags, ranks=ranks, script=script, environment=environment, kill_at=kill_at, timeout=timeout)
    started = Ranks(script, _words(flags), ranks, {**CPU_ENVIRONMENT, **(environment or {})})
    output, log = _follow(started.lines(), started.kill, Kill(kill_at, kill_after, kill_rank), timeout)
    return Run(started.wait(), output, log)


def _words(flags: Iterable[str]) -> list[str]:
    return [word for flag in flags for word in flag.split()]


class Kill(NamedTuple):
    """When a run is killed, and which rank; all of them without one."""

    at: int | None = None
    after: float = 0.0
    rank: int | None = None


def _follow(
    lines: Iterable[str], kill: Callable[[int | None], None], when: Kill, timeout: float
) -> tuple[str, TrainingLog]:
    """Read a run's output to its end; kill it once when told to, and whole after ``timeout`` seconds."""
    output, log, due = [], TrainingLog(), when.at is not None
    limit = threading.Timer(timeout, kill, [None])  # also of a run that writes nothing
    limit.daemon = True
    limit.start()
    for text in lines:
        output.append(text)
        iteration = log.add_line(text)
        if due and iteration == when.at:
            due = False
            if when.after:
                threading.Timer(when.after, kill, [when.rank]).start()
            else:
                kill(when.rank)
    limit.cancel()
    return "".join(output), log


def pretrain_flags(text: Path) -> tuple[str, ...]:
    """The tiny GPT on ``text``: what every run of :func:`pretrain` begins with."""
    return MODEL, BATCH, RATE, CPU, text_flags(text)


def pretrain(text: Path, *flags: str, ranks: int = 1, **kwargs: Any) -> Run:
    """:func:`run_ranks` of the tiny GPT on real text; fails where the run does, unless it was to be killed."""
    run = run_ranks(*pretrain_flags(text), *flags, ranks=ranks, **kwargs)
    if kwargs.get("kill_at") is None:
        assert run.returncode == 0, run.output[-6000:]
    return run


def outcomes_of(script: Path, *arguments: str, ranks: int) -> dict[str, str]:
    """The lines ``CASE name: outcome`` of ``script``, run on ``ranks`` ranks; fails where the run does."""
    run = run_ranks(*arguments, ranks=ranks, script=script)
    assert run.returncode == 0, run.output[-6000:]
    lines = [line.removeprefix("CASE ") for line in run.output.splitlines() if line.startswith("CASE ")]
    return dict(line.split(": ", 1) for line in lines)


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


def records(folder: Path, name: str = "norm_ratio.jsonl") -> list[dict[str, Any]]:
    """The rounds that a run left in ``folder``."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# What every layout measures alike of the same parameters, but for the order in which sums are rounded.
MEASURED = ("loss", "l1", "l2", "ratio", "kkt_residual", "sigma2", "linf_param")


def record_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference between what two rounds measured, in the whole and in each part."""
    pairs = [(one[key], other[key]) for key in MEASURED]
    assert one["parts"].keys() == other["parts"].keys()
    for what, parts in one["parts"].items():
        assert parts.keys() == other["parts"][what].keys()
        for name, part in parts.items():
            assert part["d"] == other["parts"][what][name]["d"]
            pairs += [(part[key], other["parts"][what][name][key]) for key in ("l1", "l2")]
    return max(abs(a - b) / abs(a) for a, b in pairs)
