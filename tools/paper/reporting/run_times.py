"""How long the long runs took, from their records."""

from typing import Any

from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import spread

HEAD = ["run", "d", "steps", "seeds", "training, CPU hours of a seed", "measuring, CPU hours of a seed", "all seeds"]


def table(records: list[dict[str, Any]]) -> Table:
    """A row for each run and length, its seeds together, and one for all of them; only the head without records."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        name = record["name"].removesuffix(f"-{record['seed']}")
        runs.setdefault((name, record["steps"]), []).append(record)
    rows = [
        [name, f"{seeds[0]['d']:,}", f"{steps:,}", str(len(seeds)), *_hours(seeds)]
        for (name, steps), seeds in runs.items()
    ]
    total = ["all", "", "", str(len(records)), "", "", f"{sum(map(_all_hours, records)):.2f}"]
    return [HEAD, *rows, total] if rows else [HEAD]


def _hours(seeds: list[dict[str, Any]]) -> list[str]:
    """Training, measuring, and both of all seeds. Older records do not have the time of measuring."""
    measured = [record["measure_cpu_hours"] for record in seeds if record.get("measure_cpu_hours") is not None]
    both = f"{sum(map(_all_hours, seeds)):.2f}"
    return [spread([record["cpu_hours"] for record in seeds], 2), spread(measured, 2) if measured else "-", both]


def _all_hours(record: dict[str, Any]) -> float:
    return float(record["cpu_hours"] + (record.get("measure_cpu_hours") or 0.0))
