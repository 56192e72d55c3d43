"""The record that a finished long run leaves: a few kB of JSON, from which tables and figures are made again."""

import json
import statistics
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.stats.writer import read_records
from megatron_lion.training_log import TrainingLog, read_training_log
from tools.paper.studies import run_settings
from tools.paper.studies.long_runs import PIECES, LongRun, measuring_seconds, read_exact

ROUND_KEYS = ("iteration", "loss", "l1", "l2", "snr", "converged")
EXACT_KEYS = ("loss", "l1", "l2", "ratio", "ratio_over_sqrt_d", "tokens", "kkt_residual")
SECONDS_AN_HOUR = 3600
LOSS_INTERVAL = 1000
LOSS_NAMES = {"gpt": "lm loss", "bert": "loss"}  # in the log; BERT's is of masked words and of the sentences' order
ON_TEXT = ("log_perplexity", "log_word_perplexity", "bits_per_byte")


def record(run: LongRun) -> dict[str, Any]:
    """All that is kept of ``run``. Raises LionError where one of its phases left no result."""
    log = read_training_log(run.folder / "log.txt", LOSS_NAMES[run.model])
    rounds = read_records(run.folder / "norm_ratio.jsonl")
    exact = read_exact(run)
    recipe = json.loads((run.folder / "recipe.json").read_text(encoding="utf-8"))
    return {
        "name": run.name,
        "study": run.study,
        "model": run.model,
        "optimizer": run.optimizer,
        "seed": run.seed,
        "steps": run.steps,
        "d": rounds[-1]["d"],
        "cpu_hours": round(_cpu_seconds(run.folder / PIECES) / SECONDS_AN_HOUR, 2),
        "measure_cpu_hours": round(measuring_seconds(run) / SECONDS_AN_HOUR, 2),
        "tokens": run.text.counts(),
        "versions": recipe["versions"],
        "settings": run_settings.kept(recipe["settings"], recipe["extra"]),
        "clipped": _clipped(log, recipe["settings"]["clip-grad"]),
        "training_loss": _means(log),
        "validation_loss": dict(sorted(log.validation.items())),
        "round_batches": rounds[-1]["batches"],
        "rounds": {key: [_rounded(one[key]) for one in rounds] for key in ROUND_KEYS},
        "exact": {step: _exact(one) for step, one in exact.items()},
        **_on_texts(run),
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """The records in ``folder``, by name. Raises LionError for a file that is not a record of a finished run."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["rounds"]["iteration"], content["exact"], content["study"], content["validation_loss"]
        except (ValueError, KeyError, TypeError) as error:
            raise LionError(f"{path} is not a record of tools/paper/long_runs.py ({error!r}): remove it") from error
        found.append(content)
    return found


def _means(log: TrainingLog) -> dict[int, float]:
    """The mean logged training loss of each 1,000 steps, by the last of them."""
    found: dict[int, list[float]] = {}
    for step, loss in log.loss.items():
        found.setdefault(-(-step // LOSS_INTERVAL) * LOSS_INTERVAL, []).append(loss)
    return {step: _rounded(statistics.fmean(losses)) for step, losses in sorted(found.items())}


def _exact(one: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: {key: part[key] for key in ("d", "l1", "l2")} for name, part in one["parts"]["kinds"].items()}
    return {key: one[key] for key in EXACT_KEYS} | {"kinds": kinds}


def _on_texts(run: LongRun) -> dict[str, dict[str, dict[int, float]]]:
    """Each of ``ON_TEXT`` by text, then by step."""
    found: dict[str, dict[str, dict[int, float]]] = {key: {} for key in ON_TEXT}
    for path in sorted(run.folder.glob("perplexity-*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        text = path.parent.name.removeprefix("perplexity-")
        for key in ON_TEXT:
            found[key][text] = {step: round(results[str(step)][key], 5) for step in run.checkpoints}
    return found


def _clipped(log: TrainingLog, limit: float) -> dict[str, float]:
    """The share of the logged steps with a gradient norm above ``limit``, and the mean norm before clipping."""
    norms = list(log.grad_norm.values())
    return {
        "share": _rounded(statistics.fmean(norm > limit for norm in norms)),
        "mean_norm": _rounded(statistics.fmean(norms)),
    }


def _cpu_seconds(path: Path) -> float:
    return sum(json.loads(line)["cpu_seconds"] for line in path.read_text(encoding="utf-8").splitlines())


def _rounded(value: Any) -> Any:
    """Six significant digits of a number; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
