"""The page of rehearsed layouts, from the rows of ``tools/rehearse_layouts.py``."""

import datetime
from typing import Any

GIB, MIB = 1 << 30, 1 << 20

PAGE = """# Rehearsed layouts

`megatron-lion rehearse` ([manual](../rehearse.md)) on one CPU core, {date}. No GPU was used, and nothing was trained.
Written in one run by

```bash
python tools/rehearse_layouts.py --output docs/results/rehearse.md --megatron FOLDER FOLDER
```

megatron-core {releases}: {rehearsals} rehearsals in {minutes:.0f} minutes, {cpu:.0f} minutes of CPU time. The
machine had other work. The seconds in the tables are CPU time of the rehearsing processes, one number for each release.
Host memory is the peak of a process. A row without a release is the same on all releases, to the byte.

## The project's recipes on a100x16

Fullest of the rehearsed ranks, in MiB; in parentheses the difference from the recipe's estimate.

| recipe | parameters | weights | gradients | state | ranks rehearsed | CPU s | host GiB |
|---|---|---|---|---|---|---|---|
{recipes}

## Layouts of public models

One rank, in GiB; in parentheses the difference from what the architecture says (formulas in
`tools/rehearsed/layouts.py`). The largest difference is {largest:.2f} %. State is momentum and master weights. The
layouts are examples, not the settings of the original runs.

| model | rank | layout | momentum, masters | parameters | weights | gradients | state | total | CPU s | host GiB |
|---|---|---|---|---|---|---|---|---|---|---|
{layouts}

## Refused

| layout | message |
|---|---|
{refused}
"""
COST = ("megatron", "seconds", "cpu", "host")


def text(rows: list[dict[str, Any]], date: datetime.date) -> str:
    """The page of ``rows``, which come release by release."""
    tables = {table: _merged([row for row in rows if row["table"] == table]) for table in ("recipes", "layouts")}
    refused = _merged([row for row in rows if row["table"] == "refused"])
    costs = [row for row in rows if "cpu" in row]
    differences = [
        abs(_difference(row, kind)) for row, _ in tables["layouts"] for kind in ("weights", "gradients", "state")
    ]
    return PAGE.format(
        date=date,
        releases=", ".join(dict.fromkeys(row["megatron"] for row in rows)),
        rehearsals=sum(row["ranks"] if row["table"] == "recipes" else 1 for row in costs),
        minutes=sum(row["seconds"] for row in costs) / 60,
        cpu=sum(row["cpu"] for row in costs) / 60,
        recipes="\n".join(_recipe(row, runs) for row, runs in tables["recipes"]),
        layouts="\n".join(_layout(row, runs) for row, runs in tables["layouts"]),
        largest=max(differences, default=0.0),
        refused="\n".join(f"| {_name(row)} | `{row['said']}` |" for row, _ in refused),
    )


def _merged(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Rows that differ only in the release and the cost as one, which names the releases if there are others."""
    merged: dict[str, list[dict[str, Any]]] = {}
    order: dict[str, None] = {}
    for row in rows:
        merged.setdefault(repr({key: value for key, value in row.items() if key not in COST}), []).append(row)
        order[_key(row)] = None
    releases = {row["megatron"] for row in rows}
    found = sorted(merged.values(), key=lambda runs: list(order).index(_key(runs[0])))
    return [
        (
            runs[0] | ({} if len(runs) == len(releases) else {"releases": ", ".join(run["megatron"] for run in runs)}),
            runs,
        )
        for runs in found
    ]


def _key(row: dict[str, Any]) -> str:
    return f"{row['name']} {row.get('ranks')} {row.get('storage')}"


def _name(row: dict[str, Any]) -> str:
    return row["name"] + (f" ({row['releases']})" if "releases" in row else "")


def _recipe(row: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    return f"| {_name(row)} | {row['parameters']:,} | {_cells(row, MIB, 1)} | {row['ranks']} | {_cost(runs)} |"


def _layout(row: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    return (
        f"| {_name(row)} | {row['rank']:,} of {row['ranks']:,} | {row['sizes']} | {row['storage']} | "
        f"{row['parameters']:,} | {_cells(row, GIB, 2)} | {row['total'] / GIB:.2f} | {_cost(runs)} |"
    )


def _cells(row: dict[str, Any], unit: int, digits: int) -> str:
    return " | ".join(
        f"{row['built'][kind] / unit:.{digits}f} ({_difference(row, kind):+.2f} %)" for kind in row["built"]
    )


def _difference(row: dict[str, Any], kind: str) -> float:
    return 100 * (float(row["built"][kind]) / float(row["expected"][kind]) - 1)


def _cost(runs: list[dict[str, Any]]) -> str:
    return f"{', '.join(f'{run["cpu"]:.0f}' for run in runs)} | {max(run['host'] for run in runs) / GIB:.1f}"
