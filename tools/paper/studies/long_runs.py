"""The paper's language runs at its own settings: the recipes ``gpt2_small`` and ``bert_small`` with ``lion_paper`` and
``sgd_paper``, with fewer and narrower layers, shorter sequences, smaller batches and other text, in fp32 on one core.

A run has three phases: training through ``launch/launch.py``, exact rounds on the fixed split at the start and at some
of its checkpoints, and perplexities of the same checkpoints. Each phase resumes where it was stopped. ``plans`` says
which runs a study has.
"""

import json
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.launcher import child_process, commands, recipes
from megatron_lion.config import LionError
from megatron_lion.stats.writer import read_records
from tools.paper.studies import run_settings
from tools.paper.studies.long_text import VOCABULARY, LongText
from tools.paper.studies.megatron_runs import (
    CPU,
    CPU_SECONDS,
    FINISHED,
    PRETRAIN,
    ROOT,
    MegatronRun,
    run_all,
)

LAUNCH = ROOT / "launch" / "launch.py"
EVALUATE = ROOT / "tools" / "eval_wikitext103.py"
STEPS = 50_000
CHECKPOINTS = tuple(range(10_000, STEPS + 1, 10_000))  # of table A1
# All that differs from the paper's recipe of the model. GPT-2 Small has 12 layers and 12 heads, BERT-Small 4 and 8.
SHAPE = {"num-layers": 2, "hidden-size": 80, "num-attention-heads": 4, "seq-length": 64, "max-position-embeddings": 64}
BATCH = {"global-batch-size": 4, "micro-batch-size": 4}
# Without some of Megatron's checks and logs of each step. The weights are the same.
FLAGS = (
    *("--rerun-mode", "disabled"),
    *("--tensorboard-log-interval", "100"),
    "--no-check-for-nan-in-loss-and-grad",
    "--no-bias-dropout-fusion",  # its compiler is off on a CPU, but is called
    "--no-create-attention-mask-in-dataloader",  # made once instead of for each batch
)
RECIPES = {"gpt": "gpt2_small", "bert": "bert_small"}
SAVE_INTERVAL = 1000  # a run that is killed repeats at most so many steps
EXACT_BATCH = ("global-batch-size=16", "micro-batch-size=16")  # only faster: exact rounds give the same with any batch
WINDOW_STEP = 32  # tokens between the windows of a perplexity
PIECES = "pieces.jsonl"


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """One run: a family of models, a recipe's optimizer, a seed, and what a study changes."""

    model: str
    optimizer: str
    seed: int
    output: Path
    """folder of all runs"""
    text: LongText
    study: str = "paper"
    label: str = ""
    """of the study's changes, in the run's name"""
    changes: tuple[str, ...] = ()
    """``key=value`` words beyond those of every run"""
    steps: int = STEPS
    checkpoints: tuple[int, ...] = CHECKPOINTS
    """those that are measured and kept; none for a run of which only the losses count"""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.model, self.label, self.optimizer, str(self.seed)) if part)

    @property
    def folder(self) -> Path:
        return self.output / self.name

    @property
    def last_step(self) -> int:
        """Step of the latest checkpoint, 0 without one."""
        tracker = self.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.is_file() else 0

    def overrides(self) -> list[str]:
        """``key=value`` words that make the paper's recipe this run's."""
        size = SHAPE | BATCH | {"vocab-size": VOCABULARY, "seed": self.seed}
        files = {"data": self.text.prefix, "run": self.folder, "data-cache-path": "{run}/cache"}
        on_one_core = {"gpus-per-node": 1, "save-interval": SAVE_INTERVAL}
        words = [f"{key}={value}" for key, value in (size | files | on_one_core).items()]
        if self.steps != STEPS:
            words += [f"train-iters={self.steps}", f"lr-decay-iters={self.steps}", f"eval-interval={self.steps // 5}"]
            words += [f"lr-warmup-iters={self.steps // 100}"]  # 1 %, as the recipe
        return [*words, *self.changes]

    def recipe(self, *changes: str) -> recipes.Recipe:
        """The resolved recipe, with further ``key=value`` changes."""
        return recipes.resolve(RECIPES[self.model], self.optimizer, "cpu", [*self.overrides(), *changes])

    def flags(self) -> list[str]:
        """Megatron's flags that are no keys of a recipe."""
        kept = self.checkpoints[0] if self.checkpoints else self.steps
        return [*FLAGS, "--save-retain-interval", str(kept)]

    def settings(self) -> dict[str, Any]:
        """All settings and flags that the run's result depends on, as its record has them."""
        return run_settings.kept(self.recipe().settings, self.flags())

    def command(self, minutes: int) -> list[str]:
        """The command line of one piece of the training."""
        names = [RECIPES[self.model], self.optimizer, "cpu"]
        extra = [*self.flags(), run_settings.MINUTES, str(minutes)]
        return [sys.executable, str(LAUNCH), *names, *self.overrides(), "--", *extra]


def train(run: LongRun, minutes: int) -> None:
    """Train to the last step, in pieces of at most ``minutes``. Each resumes from the checkpoint of the one before.

    Raises LionError where the folder has a run with other settings, and where a piece fails or ends without a new
    checkpoint. Raises SystemExit after SIGTERM, when the run has saved.
    """
    run_settings.check_folder(run.folder, run.settings())
    while (before := run.last_step) < run.steps:
        began, used = time.time(), _seconds_of_children()
        run.folder.mkdir(parents=True, exist_ok=True)
        with child_process.tied(run.command(minutes)) as process:
            process.wait()
        piece = {"from": before, "to": run.last_step, "seconds": round(time.time() - began)}
        piece["cpu_seconds"] = round(_seconds_of_children() - used)
        with (run.folder / PIECES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(piece) + "\n")
        if process.returncode:
            raise LionError(
                f"{run.name}: training ended with status {process.returncode}, as it does after a signal, with step "
                f"{run.last_step:,} saved. The same command resumes. If there was no signal, see {run.folder}/log.txt"
            )
        if run.last_step == before:
            raise LionError(f"{run.name} saved nothing after step {before}; see {run.folder}/log.txt")
        if run.last_step < run.steps and piece["seconds"] < 60 * minutes:  # only a signal ends a piece early
            raise SystemExit(f"{run.name}: stopped at step {run.last_step:,}. The same command resumes")


def _seconds_of_children() -> float:
    """CPU time of all processes that ended below this one, which are the ranks of its runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured_steps(run: LongRun) -> tuple[int, ...]:
    """The steps of exact rounds: the start and the kept checkpoints, or none."""
    return (0, *run.checkpoints) if run.checkpoints else ()


def exact_rounds(run: LongRun) -> list[MegatronRun]:
    """A round over the fixed split before the first step, and at each checkpoint, without dropout.

    Megatron measures before a step that it makes afterwards and that nothing uses.
    """
    found = []
    for step in measured_steps(run):
        folder = run.folder / f"exact-{step}"
        recipe = run.recipe(
            *("hidden-dropout=0", "attention-dropout=0", f"train-data-path={run.text.fixed_split}", *EXACT_BATCH),
            *("norm-ratio-batches=all", "norm-ratio-interval=1000000", "norm-ratio-at-start=true"),
            *(f"norm-ratio-file={folder}/norm_ratio.jsonl", f"save={folder}/unused", f"train-iters={run.steps + 1}"),
            *("eval-iters=0", f"load={run.folder if step else folder}/checkpoints"),
        )
        loaded = ["--ckpt-step", str(step), "--no-load-optim", "--no-load-rng"] if step else []
        flags = " ".join(commands.training_flags(recipe, [*FLAGS, "--exit-interval", "1", *loaded]))
        found.append(MegatronRun(folder=folder, flags=flags, script=PRETRAIN[run.model]))
    return found


def perplexities(run: LongRun, texts: dict[str, Path]) -> list[MegatronRun]:
    """Evaluations of the checkpoints on each text, by its name."""
    steps = ",".join(map(str, run.checkpoints))
    found = []
    for name, path in texts.items():
        folder = run.folder / f"perplexity-{name}"
        reader = "wikitext" if path.suffix == ".tokens" else "none"
        flags = f"--checkpoints {run.folder}/checkpoints --steps {steps} --text {path} --detokenizer {reader}"
        flags += f" --overlapping-eval {WINDOW_STEP} --micro-batch-size 64 --output {folder}/results.json {CPU}"
        found.append(MegatronRun(folder=folder, flags=flags, script=EVALUATE))
    return found


def measure(run: LongRun, texts: dict[str, Path]) -> None:
    """Make the exact rounds and perplexities that are missing. Raises LionError where one fails."""
    run_all(exact_rounds(run), threads=1)
    for folder in run.folder.glob("exact-*/unused"):
        shutil.rmtree(folder)
    if run.model == "gpt" and run.checkpoints:
        run_all(perplexities(run, texts), threads=1)


def measuring_seconds(run: LongRun) -> float:
    """CPU time of the exact rounds and perplexities."""
    finished = [json.loads(path.read_text(encoding="utf-8")) for path in run.folder.glob(f"*/{FINISHED}")]
    return sum(float(one[CPU_SECONDS]) for one in finished)


def read_exact(run: LongRun) -> dict[int, dict[str, Any]]:
    """The exact rounds by step."""
    files = {step: run.folder / f"exact-{step}" / "norm_ratio.jsonl" for step in measured_steps(run)}
    return {step: read_records(path)[0] for step, path in files.items()}
