"""Does Lion learn the same with its state in fewer bits? Tiny GPTs, every storage and seed, side by side.

    python -m tools.paper.storage_study --data runs/demo/text --output runs/storage

trains the recipe tiny_gpt on the CPU in one process for every storage and seed, through launch/launch.py, and prints
the mean final validation loss of each storage and how far it lies from its reference: the same model with fp32
momentum and fp32 master weights. Runs that are complete in OUTPUT are kept. The text comes from tools/demo_text.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from megatron_lion.training_log import read_training_log

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Storage:
    """One way to keep state: the recipe's overrides, and the name of the storage that it is compared with."""

    name: str
    overrides: tuple[str, ...]
    reference: str


STORAGES = (
    Storage("fp32 model, fp32 momentum", (), "fp32 model, fp32 momentum"),
    Storage("fp32 model, bf16 momentum", ("lion-momentum-dtype=bf16",), "fp32 model, fp32 momentum"),
    Storage("fp32 model, int8 momentum", ("lion-momentum-dtype=int8",), "fp32 model, fp32 momentum"),
    Storage("bf16 model, fp32 momentum, fp32 master", ("bf16=true",), "bf16 model, fp32 momentum, fp32 master"),
    Storage(
        "bf16 model, bf16 momentum, remainder",
        ("bf16=true", "lion-momentum-dtype=bf16", "lion-master-weights=remainder"),
        "bf16 model, fp32 momentum, fp32 master",
    ),
    Storage(
        "bf16 model, int8 momentum, remainder, bf16 gradients",
        ("bf16=true", "lion-momentum-dtype=int8", "lion-master-weights=remainder", "grad-reduce-in-bf16=true"),
        "bf16 model, fp32 momentum, fp32 master",
    ),
)


def train(storage: Storage, seed: int, options: argparse.Namespace) -> float:
    """The final validation loss of one run, which is trained unless it is complete already."""
    run = options.output / f"{storage.name.replace(', ', '_').replace(' ', '-')}_{seed}"
    if not _is_complete(run):
        steps = options.iterations
        line = [
            *(sys.executable, str(ROOT / "launch" / "launch.py"), "tiny_gpt", "lion", "cpu"),
            *("gpus-per-node=1", f"data={options.data}", f"run={run}", f"seed={seed}", f"train-iters={steps}"),
            *(f"lr-decay-iters={steps}", f"eval-interval={steps}", f"save-interval={steps}", "norm-ratio-interval=0"),
            *("norm-ratio-batches=1", *storage.overrides, *options.overrides),
        ]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate()
        finally:  # after Ctrl-C launch.py ends its ranks; subprocess.run would kill it meanwhile
            process.terminate()
            process.wait()
        if process.returncode != 0 or not _is_complete(run):
            raise LionError(f"the run in {run} failed; the end of its log:\n{_tail(run) or errors[-2000:]}")
    return read_training_log(run / "log.txt").final["validation"]


def _is_complete(run: Path) -> bool:
    try:
        return "validation" in read_training_log(run / "log.txt").final
    except LionError:  # not begun, or cut off before its first iteration
        return False


def _tail(run: Path) -> str:
    log = run / "log.txt"
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.is_file() else ""


def table(losses: dict[str, list[float]]) -> str:
    """Markdown: seeds, mean loss, and the mean and largest relative difference from the reference, seed by seed."""
    rows = ["| storage | seeds | validation loss | mean difference | largest |", "|---|---|---|---|---|"]
    for storage in STORAGES:
        if storage.name not in losses:
            continue
        pairs = zip(losses[storage.name], losses.get(storage.reference, []), strict=False)
        differences = [(loss - reference) / reference for loss, reference in pairs]
        shown = (
            [f"{statistics.mean(differences):+.2%}", f"{max(differences, key=abs):+.2%}"] if differences else ["", ""]
        )
        values = losses[storage.name]
        rows.append(f"| {storage.name} | {len(values)} | {statistics.mean(values):.4f} | {' | '.join(shown)} |")
    return "\n".join(rows)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by tools/demo_text.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each storage (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=300, help="steps of each run (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further keys of the recipe, such as lr=3e-4")
    parser.add_argument("--model", choices=("fp32", "bf16"), help="these storages alone (default: both)")
    parser.add_argument("--json", type=Path, help="also write the losses here")
    options = parser.parse_args()
    losses: dict[str, list[float]] = {}
    for seed in range(1, options.seeds + 1):
        for storage in STORAGES:
            if options.model and not storage.name.startswith(options.model):
                continue
            loss = train(storage, seed, options)
            losses.setdefault(storage.name, []).append(loss)
            print(f"  seed {seed}, {storage.name}: validation loss {loss:.4f}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(losses, indent=1) + "\n")
    print(table(losses))


if __name__ == "__main__":
    with readable_errors():
        main()
