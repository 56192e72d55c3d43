"""What tools/paper/vision_study.py left: the epochs of each run, and the learning rates of its grid."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from tools.paper.reporting import drawings, rate_findings
from tools.paper.reporting.findings import Finding, Judgement, counted, in_one_seed, read_json, sentence
from tools.paper.reporting.formulas import SQRT_D
from tools.paper.studies import rates

PAPERS = ("cifar10", "cifar100", "imagenet")
GRID = "grid.json"
CONSTANTS_MODEL = "resnet18"  # the paper's figure A3 is about it
PANELS = {"lion_paper": "LION", "sgd_paper": "SGD"}
UNTUNED = "The learning rates were not searched for on this data, so SGD may be under-tuned"
Epochs = list[dict[str, Any]]
BestRates = dict[str, tuple[dict[str, Any], dict[str, Any]]]  # rows of grid.json by model: LION's and SGD's


def curves(folder: Path, hardware: str) -> Finding:
    """Figures 1, A4, A5 from the epochs.jsonl of each model's and optimizer's run; of a grid, the best of each."""
    runs, missing = _read_runs(folder)
    if not runs:
        raise LionError("; ".join(missing) or f"no run in {folder} has finished an epoch")
    table = [["run", "epochs", "training loss", "top-1", r"$r / \sqrt{d}$"]]
    for name, epochs in runs.items():
        last = epochs[-1]
        cells = [f"{last['epoch']} of {last['epochs']}", f"{last['loss']:.4f}", f"{100 * last['top1']:.2f} %"]
        table.append([name, *cells, _shares(epochs)])
        if last["epoch"] < last["epochs"]:
            missing.append(f"{name} was cut short: {last['epoch']} of {last['epochs']} epochs")
    pairs = _pairs(runs)
    return Finding(
        verdict=_stand_in(folder)
        + (" ".join(_compared(model, *pair) for model, pair in pairs.items()) or "Not established: no pair of runs.")
        + "".join(f" {note}." for note in _untuned(folder)),
        made=f"{_first(runs)['data']}, d = {_first(runs)['d']:,}, exact gradient after each epoch; {hardware}",
        pictures={"Loss and top-1 accuracy on the left, r on the right": drawings.epochs(runs)},
        tables=[table],
        missing=missing,
        judgements=[_judged(model, *pair, _untuned(folder)) for model, pair in pairs.items()],
    )


def _read_runs(folder: Path) -> tuple[dict[str, Epochs], list[str]]:
    """Epochs by the run's folder, and what was damaged, in words. Of a grid's runs the best alone, as in the paper."""
    runs: dict[str, Epochs] = {}
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


def _pairs(runs: dict[str, Epochs]) -> dict[str, tuple[Epochs, Epochs]]:
    """The run with Lion and the one with SGD of each model that has both."""
    by_model: dict[str, dict[str, Epochs]] = {}
    for epochs in runs.values():
        by_model.setdefault(epochs[0]["model"], {})[epochs[0]["optimizer"]] = epochs
    return {model: (pair["lion"], pair["sgd"]) for model, pair in by_model.items() if {"lion", "sgd"} <= pair.keys()}


def _ahead(lion: Epochs, sgd: Epochs) -> tuple[int, int, int]:
    """After how many epochs Lion's loss is the lower, after how many its top-1 the higher, and of how many."""
    both = list(zip(lion, sgd, strict=False))
    return sum(x["loss"] < y["loss"] for x, y in both), sum(x["top1"] > y["top1"] for x, y in both), len(both)


def _compared(model: str, lion: Epochs, sgd: Epochs) -> str:
    lower, higher, of = _ahead(lion, sgd)
    held = sentence(in_one_seed(lower + higher, 2 * of))
    text = f"{held} for {model}: LION's training loss is lower after {lower} of {of} epochs, its top-1 higher after "
    return f"{text}{higher}. One size says nothing about {SQRT_D}."


def _judged(model: str, lion: Epochs, sgd: Epochs, notes: list[str]) -> Judgement:
    """Of the last epoch that both runs have. ``notes`` are sentences that the verdict ends with."""
    lower, higher, of = _ahead(lion, sgd)
    epochs = f"lower loss after {lower}, higher top-1 after {higher} of {counted(of, 'epoch')}"
    said = [f"{in_one_seed(lower + higher, 2 * of)}: {epochs}", f"One size says nothing about {SQRT_D}", *notes]
    numbers = [
        rf"{name}: loss {run[of - 1]['loss']:.3f}, top-1 {100 * run[of - 1]['top1']:.1f} %, "
        rf"$r / \sqrt{{d}}$ {_shares(run)}"
        for name, run in (("LION", lion), ("SGD", sgd))
    ]
    cut = f" ({of} of {lion[0]['epochs']} done)" if of < lion[0]["epochs"] else ""
    return Judgement(
        claim=r"LION is better throughout, and $r = \Theta(\sqrt{d})$",
        verdict=". ".join(said),
        basis=f"{model}, d = {lion[0]['d']:,}, {lion[0]['data']}, {counted(lion[0]['epochs'], 'epoch')}{cut}, "
        f"{_rates(lion, sgd)}",
        numbers=". ".join(numbers),
    )


def _rates(lion: Epochs, sgd: Epochs) -> str:
    return f"learning rates {lion[0]['lr']:g} and {sgd[0]['lr']:g} (LION, SGD)"


def _shares(epochs: Epochs) -> str:
    shares = [epoch["ratio_over_sqrt_d"] for epoch in epochs]
    return f"{min(shares):.3f} to {max(shares):.3f}"


def constants(folder: Path, hardware: str) -> Finding:
    """Figure A3 from the epochs of ResNet18 with Lion and with SGD, over the epochs that both have.

    Each norm is of the exact gradient after an epoch, and counts for all steps of the epoch.
    """
    runs, missing = _read_runs(folder)
    if CONSTANTS_MODEL not in (pairs := _pairs(runs)):
        words = f"Not established: {CONSTANTS_MODEL} with both optimizers is needed."
        return Finding(verdict=_stand_in(folder) + words, made=hardware, missing=missing)
    pair = dict(zip(rates.NORMS, pairs[CONSTANTS_MODEL], strict=True))
    done = min(map(len, pair.values()))
    repeats = {name: _repeat(rates.NORMS[name], epochs[:done]) for name, epochs in pair.items()}
    first = pair["lion"][0]
    if done < first["epochs"]:
        missing.append(f"{folder} was cut short: both runs have {done} of {first['epochs']} epochs")
    made = f"{CONSTANTS_MODEL}, {first['data']}, d = {first['d']:,}, {counted(done, 'epoch')}, {_rates(**pair)}"
    found = rates.constants(repeats)
    caption = f"(a) LION and (b) SGD: {CONSTANTS_MODEL} on {_data(folder)}"
    finding = rate_findings.compared(
        found, f"{made}, 1 seed; {hardware}", {caption: drawings.constants({}, PANELS, found)}
    )
    notes = ["The paper has the mean of five seeds, ours has one", *_untuned(folder)]
    finding.verdict = " ".join([f"{_stand_in(folder)}{finding.verdict}", *(f"{note}." for note in notes)])
    finding.missing += missing
    finding.judgements = [
        replace(one, verdict=". ".join([one.verdict, *notes]), basis=made) for one in finding.judgements
    ]
    return finding


def _repeat(norm: str, epochs: Epochs) -> dict[str, Any]:
    """What :func:`tools.paper.studies.rates.constants` needs of one run."""
    return {
        "steps": [epoch["iteration"] for epoch in epochs],
        "d": epochs[0]["d"],
        "norms": [[epoch[norm] for epoch in epochs]],
        "l2_norms": [[epoch["l2"] for epoch in epochs]],
        "converged": len(epochs),
        "rounds": len(epochs),
        "exact": True,
        "lr": epochs[0]["lr"],
    }


def rates_found(folder: Path, hardware: str) -> Finding:
    """Table A2 from grid.json: the best rate of each model and optimizer, and the top-1 of every rate tried."""
    grid = _grid(folder)
    every = list(dict.fromkeys(rate for row in grid.values() for rate in row["tried"]))
    table = [["learning rate", *grid]] + [[rate, *(_top1(row, rate) for row in grid.values())] for rate in every]
    pairs = {name[:-5]: (row, grid[f"{name[:-5]}-sgd"]) for name, row in grid.items() if _has_pair(name, grid)}
    said = _said_of_rates(pairs) if pairs else "not established: no model has both optimizers"
    first = next(iter(grid.values()))
    at_edge = [name for name, row in grid.items() if row["lr"] >= max(map(float, row["tried"]))]
    edge = f" The largest rate tried was the best of {', '.join(at_edge)}: a larger one may be better." * bool(at_edge)
    return Finding(
        verdict=f"{_stand_in(folder)}{sentence(said)}.{edge}",
        made=f"{first['data']}, {counted(first['epochs'], 'epoch')}, top-1 by learning rate; {hardware}",
        tables=[table],
        judgements=[_judged_rates(pairs, first)] if pairs else [],
    )


def _said_of_rates(pairs: BestRates) -> str:
    held = sum(lion["lr"] <= sgd["lr"] for lion, sgd in pairs.values())
    of = f"{held} of {counted(len(pairs), 'model')}"
    return f"{in_one_seed(held, len(pairs))}: LION's best rate is at most SGD's for {of}"


def _judged_rates(pairs: BestRates, first: dict[str, Any]) -> Judgement:
    edge = any(row["lr"] >= max(map(float, row["tried"])) for pair in pairs.values() for row in pair)
    numbers = "; ".join(f"{model}: {lion['lr']:g} and {sgd['lr']:g}" for model, (lion, sgd) in pairs.items())
    return Judgement(
        claim="LION's best learning rate is at most SGD's (by the paper's table, not in its words)",
        verdict=_said_of_rates(pairs)
        + ". The largest rate tried was the best of a run, so a larger one may be better" * edge,
        basis=f"{', '.join(pairs)}, {first['data']}, {counted(first['epochs'], 'epoch')}",
        numbers=f"best rate of LION and of SGD, {numbers}",
    )


def _top1(row: dict[str, Any], rate: str) -> str:
    """A run's at one of the rates, the best marked; a dash where it diverged or was not tried."""
    if (top1 := row["tried"].get(rate)) is None:
        return "-"
    return f"{100 * top1:.2f} %" + " (best)" * (float(rate) == row["lr"])


def _has_pair(name: str, grid: dict[str, Any]) -> bool:
    return name.endswith("-lion") and f"{name[:-5]}-sgd" in grid


def _data(folder: Path) -> str:
    """The data set's name: ``digits`` of ``digits-100``, the run of 100 epochs."""
    return folder.name.partition("-")[0]


def _stand_in(folder: Path) -> str:
    return "" if folder.name in PAPERS else f"The data set is {_data(folder)}, not the paper's. "


def _untuned(folder: Path) -> list[str]:
    """What else a verdict says where the rates are the paper's for another data set."""
    return [] if folder.name in PAPERS or (folder / GRID).is_file() else [UNTUNED]


def _first(runs: dict[str, Epochs]) -> dict[str, Any]:
    return next(iter(runs.values()))[0]
