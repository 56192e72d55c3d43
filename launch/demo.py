"""Run the demo in an existing environment: prepare text, train twice, draw figures, print the next steps.

Lion is killed with SIGKILL in the middle and resumed from its last checkpoint. SGD runs without a break. Each run
writes log.txt and norm_ratio.jsonl to OUTPUT/{lion,sgd}. Runs that are already complete are kept.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_lion.config import LionError
from megatron_lion.integration.cpu import run_flags
from megatron_lion.run import readable_errors
from megatron_lion.training_log import TrainingLog, read_training_log

ROOT = Path(__file__).resolve().parent.parent
TEXT = "--vocab-size 512"
RANKS = 4
MODEL = "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128"
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
# Megatron's fused GELU is a dozen operations where nothing compiles it, a third of a step on a CPU; torch's is one.
ACTIVATION = "--no-bias-gelu-fusion"
LAYOUT = "--tensor-model-parallel-size 2 --use-distributed-optimizer"
BATCH = "--micro-batch-size 16 --global-batch-size 32 --lr-decay-style cosine --lr-warmup-iters 10 --num-workers 0"
# The best learning rates of a small sweep at this size (docs/results/demo.md). A real model needs smaller ones.
OPTIMIZERS = {
    "lion": "--optimizer lion --lr 1e-3 --min-lr 1e-4 --weight-decay 0.7",
    "sgd": "--optimizer sgd --lr 0.1 --min-lr 0.01 --weight-decay 1e-4",
}


def command(name: str, text: Path, folder: Path, iterations: int, save_interval: int) -> list[str]:
    """The torchrun command of one run. The same command resumes it."""
    data = [
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(text / "tokenizer.model")),
        *(
            part
            for split in ("train", "valid", "test")
            for part in (f"--{split}-data-path", str(text / f"{split}_text_document"))
        ),
    ]
    run = f"--train-iters {iterations} --log-interval 1 --eval-interval {save_interval} --eval-iters 8"
    checkpoints = folder / "checkpoints"
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)),
        *(
            str(ROOT / "launch" / "pretrain_gpt.py"),
            *f"{MODEL} {NO_DROPOUT} {ACTIVATION} {LAYOUT} {BATCH} {run} {OPTIMIZERS[name]}".split(),
        ),
        *(*data, "--save", str(checkpoints), "--load", str(checkpoints), "--save-interval", str(save_interval)),
        *("--norm-ratio-at-start", "--norm-ratio-file", str(folder / "norm_ratio.jsonl")),
    ]


def train(name: str, line: list[str], log_path: Path, kill_at: int | None = None) -> TrainingLog:
    """Run ``line``, append its output to ``log_path`` and show progress. SIGKILL all processes at iteration
    ``kill_at``.

    Raises LionError with the end of the log if the run fails.
    """
    log = TrainingLog()
    environment = {**os.environ, **run_flags.ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        for iteration in follow(process, log_path, log):
            show_progress(name, iteration, log)
            if iteration == kill_at:
                kill(process)
    except BaseException:  # such as Ctrl-C: leave no ranks running
        kill(process)
        raise
    print(flush=True)
    if process.wait() != 0 and kill_at not in log.loss:  # it ended by itself
        tail = "".join(log_path.read_text(errors="replace").splitlines(keepends=True)[-15:])
        raise LionError(f"the {name} run failed with exit status {process.returncode}; {log_path} ends with\n{tail}")
    return log


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL the launcher and its ranks, which torchrun starts in separate sessions."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()


def follow(process: "subprocess.Popen[str]", log_path: Path, log: TrainingLog) -> Iterator[int]:
    """Yield each iteration that ``process`` reports, and copy its output to ``log_path``."""
    assert process.stdout is not None
    with log_path.open("a") as file:
        for text in process.stdout:
            file.write(text)
            file.flush()
            if text.startswith("megatron-lion:"):
                print(f"  {text.rstrip()}", flush=True)
            if (iteration := log.add_line(text)) is not None:
                yield iteration


def show_progress(name: str, iteration: int, log: TrainingLog) -> None:
    """One line that overwrites itself on a terminal, one line in 25 elsewhere."""
    remaining = (log.iterations - iteration) * log.milliseconds[iteration] / 1000
    text = f"  {name}: iteration {iteration}/{log.iterations}  loss {log.loss[iteration]:.3f}"
    text += f"  about {remaining:.0f} s left"
    if sys.stdout.isatty():
        print(f"\r{text}   ", end="", flush=True)
    elif iteration % 25 == 0:
        print(text, flush=True)


def count_equal(before: TrainingLog, after: TrainingLog) -> tuple[int, int]:
    """Compare the losses that the killed and the resumed run both logged: the number of equal ones, and of all.

    The second one after a restart is skipped, because there Megatron logs the mean of the first two.
    """
    shared = sorted(before.loss.keys() & after.loss.keys())
    compared = shared[:1] + shared[2:]
    return sum(before.loss[i] == after.loss[i] for i in compared), len(compared)


def is_complete(folder: Path, iterations: int) -> bool:
    """Whether the run in ``folder`` reached its last iteration."""
    try:
        log = read_training_log(folder / "log.txt")
    except LionError:  # never started, or ended before its first iteration
        return False
    return "test" in log.final and iterations in log.loss


def figures(output: Path) -> None:
    """Draw both runs' losses and norm ratios, and write their table."""
    runs = {"Lion": output / "lion", "SGD": output / "sgd"}
    logs = [word for name, folder in runs.items() for word in ("--run", f"{name}={folder / 'log.txt'}")]
    tool("compare_runs.py", *logs, "--figure", output / "loss.png", "--table", output / "table.md")
    rounds = [word for name, folder in runs.items() for word in ("--run", f"{name}={folder / 'norm_ratio.jsonl'}")]
    tool("norm_ratio_figure.py", *rounds, "--figure", output / "norm_ratio.png")


def tool(name: str, *words: object) -> None:
    """Run a script of tools/. Raises LionError if it fails, after it has printed its own message."""
    line = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    if status := subprocess.run(line, check=False).returncode:
        raise LionError(f"tools/{name} failed with exit status {status}, see above")


def next_steps(output: Path) -> str:
    """What to look at, and the command lines that evaluate and export the Lion run's last checkpoint."""
    checkpoints = output / "lion" / "checkpoints"
    evaluation = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(ROOT / "tools" / "eval_wikitext103.py", "--checkpoints", checkpoints, "--steps", "latest"),
        *("--text", ROOT / "README.md", "--detokenizer", "none"),
        *("--tensor-model-parallel-size", "2", "--micro-batch-size", "16"),
    ]
    export = [sys.executable, ROOT / "tools" / "export_hf.py", "--checkpoints", checkpoints, "--output", output / "hf"]
    files = {
        output / "loss.png": "loss of both runs",
        output / "norm_ratio.png": "l1/l2 of the gradient",
        output / "table.md": "final losses",
        output / "lion" / "log.txt": "Megatron's log, with Lion's start-up line",
    }
    width = max(len(str(path)) for path in files)
    listed = "\n".join(f"    {path!s:{width}}  {contents}" for path, contents in files.items())
    return f"""Look at
{listed}
Evaluate Lion's checkpoint, on README.md
    MEGATRON_LION_DEVICE=cpu {shlex.join(map(str, evaluation))}
Export it to Hugging Face's format
    MEGATRON_LION_DEVICE=cpu {shlex.join(map(str, export))}"""


def say(title: str) -> None:
    """A heading on the screen."""
    print(f"\n== {title}", flush=True)


def train_both(output: Path, iterations: int, batches: int) -> None:
    """Train with Lion, killed and resumed, then with SGD."""
    save_interval = max(iterations // 3, 1)
    kill_at = save_interval + save_interval // 3
    for name in OPTIMIZERS:
        folder = output / name
        if is_complete(folder, iterations):
            print(f"  {name}: complete in {folder}, kept (remove the folder to train again)")
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        line = command(name, output / "text", folder, iterations, save_interval)
        line += f"--norm-ratio-batches {batches} --norm-ratio-interval {max(iterations // 2, 1)}".split()
        started = time.monotonic()
        if name == "lion":
            before = train(name, line, folder / "log.txt", kill_at=kill_at)
            print(
                f"  lion: killed with SIGKILL at iteration {kill_at}; resuming from its checkpoint at {save_interval}"
            )
            after = train(name, line, folder / "log.txt")
            equal, compared = count_equal(before, after)
            print(
                f"  lion: {equal} of {compared} losses after the resume equal the killed run's, bit for bit as logged"
            )
        else:
            train(name, line, folder / "log.txt")
        print(f"  {name}: done in {time.monotonic() - started:.0f} s")


def main() -> None:
    """Make the text, train with Lion, killed and resumed, then with SGD, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for text, logs, checkpoints and figures")
    parser.add_argument("--iterations", type=int, default=90, help="steps of each run (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=90, help="batches of a norm-ratio round (default: %(default)s)")
    options = parser.parse_args()
    say("text: the documentation that ships with Python")
    tool("demo_text.py", "--output", options.output / "text", *TEXT.split())
    say("training: a tiny GPT on 4 gloo ranks, TP 2 x DP 2, distributed optimizer")
    train_both(options.output, options.iterations, options.batches)
    say("figures")
    figures(options.output)
    say("done")
    print(next_steps(options.output.resolve()))


if __name__ == "__main__":
    with readable_errors():
        main()
