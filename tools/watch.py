#!/usr/bin/env python3
"""Draw the loss and the norm ratio of running or finished runs from their files.

    python tools/watch.py --run Lion=runs/tiny_gpt-lion-cpu --figure watch.svg --every 30
    python tools/watch.py --run Lion=runs/a --run SGD=runs/b --figure both.png

A run is a folder as launch/launch.py leaves it: log.txt, or else the TensorBoard events in tensorboard/, and
norm_ratio.jsonl where the norm ratio is measured. With --every the picture is drawn again after so many seconds, until
every run has logged its last iteration. Without it, it is drawn once. A picture is replaced atomically, so a viewer
never sees half of one.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from compare_runs import figure_path, named_run, plot_losses, runs_by_name
from norm_ratio_figure import Record, plot_ratios

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from megatron_lion.stats.writer import read_records
from megatron_lion.training_log import TrainingLog, read_training_log

LOSS = "lm loss"  # Megatron's name for it, in its log and in its events


def read_run(folder: Path) -> tuple[TrainingLog | None, list[Record]]:
    """What the run in ``folder`` has logged so far, None before its first iteration, and its rounds.

    Raises LionError where the folder has neither a log nor events.
    """
    if (folder / "log.txt").is_file():
        try:
            log: TrainingLog | None = read_training_log(folder / "log.txt")
        except LionError:  # it is starting
            log = None
    elif any(folder.glob("tensorboard/events.*")):
        log = read_events(folder / "tensorboard")
    else:
        raise LionError(f"{folder} has neither log.txt nor tensorboard/events.*: pass a run's folder, as NAME=FOLDER")
    try:
        rounds = read_records(folder / "norm_ratio.jsonl")
    except LionError:  # not measured, or no round yet
        rounds = []
    return log, rounds


def read_events(folder: Path) -> TrainingLog | None:
    """The losses in TensorBoard's event files. They do not say how many iterations there will be."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if LOSS not in tags:
        return None
    log = TrainingLog(loss={event.step: event.value for event in events.Scalars(LOSS)})
    if f"{LOSS} validation" in tags:
        log.validation = {event.step: event.value for event in events.Scalars(f"{LOSS} validation")}
    return log


def draw(runs: dict[str, tuple[TrainingLog, list[Record]]], path: Path) -> None:
    """Loss over iterations, and below it the norm ratio where a run has rounds; replaces ``path`` whole."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rounds = {name: records for name, (_, records) in runs.items() if records}
    size: dict[str, Any] = {"figsize": (7.5, 7.0 if rounds else 4.0), "layout": "constrained"}
    figure, panels = plt.subplots(2 if rounds else 1, sharex=True, squeeze=False, **size)
    plot_losses(panels[0, 0], {name: log for name, (log, _) in runs.items()})
    if rounds:
        plot_ratios(panels[1, 0], rounds)
    panels[-1, 0].set_xlabel("iteration")
    panels[0, 0].set_title(", ".join(f"{name}: {progress(log)}" for name, (log, _) in runs.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    os.replace(partial, path)


def progress(log: TrainingLog) -> str:
    """The state of a run: its last iteration, of how many, and that one's loss."""
    last = max(log.loss)
    return f"{last:,}{f' of {log.iterations:,}' if log.iterations else ''}, loss {log.loss[last]:.4f}"


def main(arguments: list[str] | None = None) -> int:
    """Draw once, or again and again until all runs are at their end. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=named_run, action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    add("--figure", type=figure_path, required=True, help="picture to write (.png, .svg or .pdf)")
    add("--every", type=float, default=0.0, metavar="SECONDS", help="draw again after so many seconds (default: once)")
    options = parser.parse_args(arguments)
    folders = runs_by_name(options.run)
    while True:
        found = {name: read_run(folder) for name, folder in folders.items()}
        started = {name: (log, rounds) for name, (log, rounds) in found.items() if log}
        if started:
            draw(started, options.figure)
            print("; ".join(f"{name}: {progress(log)}" for name, (log, _) in started.items()), flush=True)
        elif not options.every:
            raise LionError(f"no loss yet in {', '.join(map(str, folders.values()))}: wait, or use --every SECONDS")
        ended = [bool(log and log.iterations and max(log.loss) >= log.iterations) for log, _ in found.values()]
        if not options.every or all(ended):
            return 0
        time.sleep(options.every)


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
