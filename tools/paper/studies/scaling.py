"""The exponent of r against d: which rounds count, which belong together, and the fits."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.stats.writer import read_records
from tools.paper import theory

START = "start"  # of the rounds before the first step, where no optimizer has acted yet
KEYS = ("iteration", "batches", "tokens", "loss", "d", "d_padding", "ratio", "ratio_over_sqrt_d", "snr", "converged")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The exponent over the sizes at one point of training, each size's rounds weighing alike."""

    optimizer: str
    iteration: int
    sizes: int
    exponent: float
    low: float
    high: float

    @property
    def holds_half(self) -> bool:
        """Whether 0.5 lies in the interval."""
        return self.low <= 0.5 <= self.high


def read_run(optimizer: str, path: Path) -> list[dict[str, Any]]:
    """The rounds of one run's file, as points of the study.

    Raises LionError where the file holds rounds of more than one model, or lacks what a round has.
    """
    points = []
    for record in read_records(path):
        if missing := [key for key in ("d", "ratio", "converged") if key not in record]:
            raise LionError(f"{path}: the round at iteration {record['iteration']} has no {', '.join(missing)}")
        point = {key: record.get(key) for key in KEYS}
        points.append({"optimizer": START if record["iteration"] == 0 else optimizer, **point})
    if len(sizes := sorted({point["d"] for point in points})) > 1:
        raise LionError(f"{path} mixes runs: it has rounds with d = {' and '.join(map(str, sizes))}; give a file a run")
    return points


def unique(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points, those before the first step once for each size: runs of one seed start from the same weights."""
    return list({(p["optimizer"], p["iteration"], p["d"], p["ratio"]): p for p in points}.values())


def fits(points: Sequence[dict[str, Any]]) -> list[Fit]:
    """A fit for each optimizer and iteration that has converged rounds of three sizes or more.

    Points of one fit are of different runs, as its interval asks for. A size with several rounds (seeds) gives several.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for point in points:
        if point["converged"] and point["ratio"]:
            groups[point["optimizer"], point["iteration"]].append(point)
    found = []
    for (optimizer, iteration), group in sorted(groups.items(), key=lambda pair: (pair[0][0] != START, pair[0])):
        if (sizes := len({point["d"] for point in group})) >= 3:
            law = theory.fit_power_law([point["d"] for point in group], [point["ratio"] for point in group])
            numbers = {"exponent": law.exponent, "low": law.low, "high": law.high}
            found.append(Fit(optimizer=optimizer, iteration=iteration, sizes=sizes, **numbers))
    return found


def result(
    points: Sequence[dict[str, Any]], command: str, *, model: str = "gpt", seconds: float | None = None
) -> dict[str, Any]:
    """What the study of one kind of model found, as it is written to scaling.json.

    Raises LionError where nothing can be fitted.
    """
    fitted = fits(points)
    if not fitted:
        held = sorted({point["d"] for point in points if point["converged"]})
        raise LionError(
            f"no exponent: three sizes with a converged round at the same iteration are needed, and converged rounds "
            f"have d = {', '.join(map(str, held)) or 'none'}; add runs, or give rounds more batches"
        )
    rows = [asdict(fit) | {"holds_half": fit.holds_half} for fit in fitted]
    return {"command": command, "model": model, "seconds": seconds, "points": list(points), "fits": rows}
