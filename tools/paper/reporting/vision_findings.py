"""What tools/paper/vision_study.py left: the epochs of each run, and the learning rates of its grid."""

import json
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from tools.paper.reporting import drawings
from tools.paper.reporting.findings import Finding, read_json

PAPERS = ("cifar10", "cifar100", "imagenet")
GRID = "grid.json"


def curves(folder: Path, hardware: str) -> Finding:
    """Figures 1, A4, A5 from the epochs.jsonl of each model's and optimizer's run; of a grid, the best of each."""
    runs, missing = _read_runs(folder)
    if not runs:
        raise LionError("; ".join(missing) or f"no run in {folder} has finished an epoch")
    table = [["run", "epochs", "training loss", "top-1", "r / sqrt(d)"]]
    for name, epochs in runs.items():
        shares, last = [epoch["ratio_over_sqrt_d"] for epoch in epochs], epochs[-1]
        cells = [f"{last['epoch']} of {last['epochs']}", f"{last['loss']:.4f}", f"{100 * last['top1']:.2f} %"]
        table.append([name, *cells, f"{min(shares):.3f} to {max(shares):.3f}"])
        if last["epoch"] < last["epochs"]:
            missing.append(f"{name} was cut short: {last['epoch']} of {last['epochs']} epochs")
    return Finding(
        verdict=_stand_in(folder) + (" ".join(_compared(runs)) or "Cannot be said: no model has a run of each."),
        made=f"{_first(runs)['data']}, d = {_first(runs)['d']:,}, exact gradient after each epoch; {hardware}",
        pictures={"loss, top-1 and r": drawings.epochs(runs)},
        tables=[table],
        missing=missing,
    )


def _read_runs(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Epochs by the run's folder, and what was damaged, in words. Of a grid's runs the best alone, as in the paper."""
    runs: dict[str, list[dict[str, Any]]] = {}
    missing = []
    grid = _grid(folder)
    best = {f"{name}-{row['lr']:g}" for name, row in grid.items()}
    others = {f"{name}-{rate}" for name, row in grid.items() for rate in row["tried"]} - best
    for path in sorted(folder.glob("*/epochs.jsonl")):
        if path.parent.name in others:
            continue
        try:
            epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            missing.append(f"{path} is damaged ({error}): its run is left out")
            continue
        runs |= {path.parent.name: epochs} if epochs else {}
    return runs, missing


def _grid(folder: Path) -> dict[str, Any]:
    return read_json(folder / GRID) if (folder / GRID).is_file() else {}


def _compared(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence for each model that has a run with Lion and one with SGD."""
    by_model: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for epochs in runs.values():
        by_model.setdefault(epochs[0]["model"], {})[epochs[0]["optimizer"]] = epochs
    sentences = []
    for model, pair in by_model.items():
        if not {"lion", "sgd"} <= pair.keys():
            continue
        both = list(zip(pair["lion"], pair["sgd"], strict=False))
        lower = sum(lion["loss"] < sgd["loss"] for lion, sgd in both)
        higher = sum(lion["top1"] > sgd["top1"] for lion, sgd in both)
        held = "Held" if min(lower, higher) == len(both) else "Held in part" if lower or higher else "Not held"
        text = f"{held} for {model}: after {lower} of {len(both)} epochs Lion's training loss is the lower, after "
        sentences.append(f"{text}{higher} its top-1 the higher. One model of a size says nothing about sqrt(d).")
    return sentences


def rates_found(folder: Path, hardware: str) -> Finding:
    """Table A2 from grid.json: the best rate of each model and optimizer, and the top-1 of every rate tried."""
    grid = _grid(folder)
    every = list(dict.fromkeys(rate for row in grid.values() for rate in row["tried"]))
    table = [["learning rate", *grid]] + [[rate, *(_top1(row, rate) for row in grid.values())] for rate in every]
    pairs = [(row, grid[f"{name[:-5]}-sgd"]) for name, row in grid.items() if _has_pair(name, grid)]
    held = sum(lion["lr"] <= sgd["lr"] for lion, sgd in pairs)
    first = next(iter(grid.values()))
    at_edge = [name for name, row in grid.items() if row["lr"] >= max(map(float, row["tried"]))]
    edge = f" The largest rate tried was the best of {', '.join(at_edge)}: a larger one may be better." * bool(at_edge)
    return Finding(
        verdict=f"{_stand_in(folder)}LION's best rate is at most SGD's for {held} of {len(pairs)} models.{edge}",
        made=f"{first['data']}, {first['epochs']} epochs, top-1 by learning rate; {hardware}",
        tables=[table],
    )


def _top1(row: dict[str, Any], rate: str) -> str:
    """A run's at one of the rates, the best marked; a dash where it diverged or was not tried."""
    if (top1 := row["tried"].get(rate)) is None:
        return "-"
    return f"{100 * top1:.2f} %" + " (best)" * (float(rate) == row["lr"])


def _has_pair(name: str, grid: dict[str, Any]) -> bool:
    return name.endswith("-lion") and f"{name[:-5]}-sgd" in grid


def _stand_in(folder: Path) -> str:
    return "" if folder.name in PAPERS else f"Not the paper's data: {folder.name} stands in for it. "


def _first(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return next(iter(runs.values()))[0]
