"""Long runs that were never made: folders as a run leaves them, and records of whole studies."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.paper.studies import long_records, long_runs, long_text, plans, run_settings
from tools.paper.studies.long_runs import CHECKPOINTS, STEPS, LongRun
from tools.paper.studies.megatron_runs import FINISHED

ITERATION = " iteration {0}/ 50000 | elapsed time per iteration (ms): 5.0 | lm loss: {1:.4E} | grad norm: 1.5 |\n"
VALIDATION = " validation loss at iteration {0} | lm loss value: {1:.4E} | lm loss PPL: 1 |\n"
D = 400
BEST = {"lion_paper": 3e-4, "sgd_paper": 1e-1, "adamw": 1e-3}  # rates of the search
Record = dict[str, Any]


def run_of(folder: Path, optimizer: str = "lion_paper", seed: int = 1234) -> LongRun:
    text = long_text.paths(folder / "text", "gpt")
    return LongRun(model="gpt", optimizer=optimizer, seed=seed, output=folder, text=text)


def round_at(step: int, loss: float, ratio: float) -> Record:
    parts = {"kinds": {"embedding": {"d": 100, "l1": 1.0, "l2": 0.5}}}
    numbers = {"loss": loss, "l1": 0.25 * ratio, "l2": 0.25, "ratio": ratio, "ratio_over_sqrt_d": ratio / D**0.5}
    known = {"iteration": step, "d": D, "batches": 100, "snr": 12.0, "converged": True, "tokens": 64, "parts": parts}
    return known | numbers | {"kkt_residual": 1.0}


def start(run: LongRun, name: str = "recipe.json") -> None:
    """Leave the recipe of a start in the run's folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    content = {"settings": run.recipe().settings, "extra": [*run.flags(), run_settings.MINUTES, "50"]}
    (run.folder / name).write_text(json.dumps(content | {"versions": {"torch": "2"}}))


def finish(run: LongRun, loss: float) -> None:
    """Leave in the run's folder what its three phases would."""
    run.folder.mkdir(parents=True)
    steps = range(100, STEPS + 1, 100)
    log = "".join(ITERATION.format(step, loss) for step in steps)
    log += "".join(VALIDATION.format(step, loss + 0.1) for step in CHECKPOINTS)
    (run.folder / "log.txt").write_text(log)
    rounds = [round_at(step, loss, 8.0) for step in range(1000, STEPS + 1, 1000)]
    (run.folder / "norm_ratio.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds))
    for step in (0, *CHECKPOINTS):
        folder = run.folder / f"exact-{step}"
        folder.mkdir()
        (folder / "norm_ratio.jsonl").write_text(json.dumps(round_at(step, loss - 0.1, 7.0)) + "\n")
    start(run)
    (run.folder / long_runs.PIECES).write_text('{"cpu_seconds": 1800}\n{"cpu_seconds": 900}\n')
    for name in ("held-out", "wikitext"):
        folder = run.folder / f"perplexity-{name}"
        folder.mkdir()
        on_text = {"log_perplexity": loss, "log_word_perplexity": 2 * loss, "bits_per_byte": loss / 2}
        (folder / "results.json").write_text(json.dumps({"results": dict.fromkeys(map(str, CHECKPOINTS), on_text)}))
        (folder / FINISHED).write_text('{"cpu_seconds": 90.0}')
    run.text.folder.mkdir(parents=True, exist_ok=True)
    for name in ("text", "fixed"):
        counts = {part: {"tokens": 1000} for part in ("train", "valid", "test", "all")}
        (run.text.folder / f"{name}_manifest.json").write_text(json.dumps({"counts": counts}))


def finished_pair(output: Path, folder: Path) -> Path:
    """Write records of two seeds of Lion and of SGD with momentum to ``folder``, and return it."""
    folder.mkdir()
    for optimizer, loss in (("lion_paper", 5.0), ("sgd_paper", 7.0)):
        for seed in (1234, 1235):
            run = run_of(output, optimizer, seed)
            finish(run, loss + 0.01 * (seed - 1234))
            (folder / f"{run.name}.json").write_text(json.dumps(long_records.record(run)))
    return folder


def planned(study: str, model: str = "gpt", records: Iterable[Record] = ()) -> list[Record]:
    """A record of each run of a study."""
    runs = plans.PLANS[study](Path(), {model: long_text.paths(Path(), model)}, list(records))
    return [record(run) for run in runs]


def record(run: LongRun) -> Record:
    """As ``long_records.record``: losses fall by optimizer, rate and seed, and r is 0.3 sqrt(d)."""
    changes = dict(change.split("=") for change in run.changes)
    width = int(changes.get("hidden-size", 80))
    lr = float(changes.get("lr", 1e-5 if run.optimizer == "lion_paper" else 1e-4))
    last = {"lion_paper": 5.0, "sgd_paper": 7.0, "sgd_paper_no_momentum": 7.2, "adamw": 5.2}[run.optimizer]
    by_seed = {"lion_paper": 0.01, "sgd_paper": 0.02}.get(run.optimizer, 0.0)
    last += by_seed * (run.seed - plans.FIRST_SEED) + (1.0 if run.model == "bert" else 0.0)
    last -= 1.0 if run.study != "paper" and run.optimizer == "sgd_paper" else 0.0
    last += 0.1 * abs(math.log10(lr / BEST[run.optimizer])) if run.study == "search" else 0.0
    losses = {step: last + 0.5 * (run.steps / step - 1.0) / 49 for step in range(1000, run.steps + 1, 1000)}
    tested = {str(step): losses[step] + 0.2 for step in losses if step % (run.steps // 5) == 0}
    exact = {"0": 7.7} | {str(step): losses[step] - 0.1 for step in run.checkpoints}
    perplexities = {text: {str(step): losses[step] for step in run.checkpoints} for text in ("held-out", "wikitext")}
    kinds = {"embedding": {"d": 2112 * width}, "mlp": {"d": 24 * width**2}}
    d = sum(kind["d"] for kind in kinds.values())
    for kind in kinds.values():
        kind |= {"l1": 0.03 * kind["d"], "l2": 0.1 * kind["d"] ** 0.5}
    numbers = {"l1": 0.03 * d, "l2": 0.1 * d**0.5, "ratio": 0.3 * d**0.5, "ratio_over_sqrt_d": 0.3, "tokens": 2000}
    settings = {"lr": lr, "min-lr": lr / 10, "seed": run.seed, "weight-decay": float(changes.get("weight-decay", 0.01))}
    shape = {"num-layers": 2, "hidden-size": width, "seq-length": 64, "global-batch-size": 4}
    return {
        **{"name": run.name, "study": run.study, "model": run.model, "optimizer": run.optimizer, "seed": run.seed},
        **{"steps": run.steps, "d": d, "cpu_hours": 0.5, "measure_cpu_hours": 0.1, "tokens": {"train": 9, "fixed": 5}},
        "settings": settings | shape | {"vocab-size": 2048, "clip-grad": 1.0},
        "clipped": {"share": 0.9, "mean_norm": 1.5},
        "training_loss": {str(step): loss for step, loss in losses.items()},
        "validation_loss": tested,
        "round_batches": 100,
        "rounds": rounds(list(losses), numbers),
        "exact": {step: numbers | {"loss": loss, "kinds": kinds} for step, loss in exact.items()},
        "log_perplexity": perplexities,
        "bits_per_byte": {text: {step: value / 3 for step, value in of.items()} for text, of in perplexities.items()},
        "log_word_perplexity": {text: {step: 2 * v for step, v in of.items()} for text, of in perplexities.items()},
    }


def rounds(steps: list[int], numbers: Record) -> dict[str, list[Any]]:
    """Rounds of noise: a signal-to-noise ratio of 1, and none converged."""
    norms = {key: [numbers[key]] * len(steps) for key in ("l1", "l2")}
    rest = {"loss": [5.0] * len(steps), "snr": [1.0] * len(steps), "converged": [False] * len(steps)}
    return {"iteration": steps} | norms | rest


def write(folder: Path, records: Iterable[Record]) -> Path:
    """Write each record to ``folder`` under its name, and return it."""
    folder.mkdir(exist_ok=True)
    for one in records:
        (folder / f"{one['name']}.json").write_text(json.dumps(one))
    return folder
