"""summary.md and log.txt, written after each part, so that a check that is cut off leaves what it has."""

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tools.benchmark.queued_rows import QueuedRow, markdown
from tools.gpu_check import records
from tools.gpu_check.runner import Outcome

LOG_BYTES = {True: 4_000, False: 40_000}  # of a part that passed, of one that did not; from its end
SHOWN_LINES = 30  # of a failed part, in the summary


def commit(root: Path) -> str:
    """The commit that is checked, and whether files differ from it."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "HEAD")
    if not name:
        return "unknown (not a git checkout)"
    return name + (" with local changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def write(out: Path, outcomes: Sequence[Outcome], total: int, *, rehearsal: bool, root: Path) -> None:
    """Write both files."""
    text = "\n".join(lines(out / "rows.jsonl", outcomes, total, rehearsal=rehearsal, commit_name=commit(root)))
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    logs = [f"===== {one.part.name}: {one.result}\n{tail(one)}" for one in outcomes]
    (out / "log.txt").write_text("\n".join(logs), encoding="utf-8")


def tail(one: Outcome) -> str:
    """The end of a part's output, longer where it did not pass."""
    return one.log.read_bytes()[-LOG_BYTES[one.passed] :].decode("utf-8", "replace")


def lines(rows: Path, outcomes: Sequence[Outcome], total: int, *, rehearsal: bool, commit_name: str) -> list[str]:
    """The summary."""
    passed = sum(one.passed for one in outcomes)
    environment = next(iter(records.read(rows, "environment")), {"environment": {}, "missing": []})
    made = ["# GPU check", ""]
    if rehearsal:
        made += ["**REHEARSAL on a CPU.** No GPU was used. The times say nothing about a GPU.", ""]
    made += [f"**{passed} of {total} parts passed.**", ""]
    made += [f"- {name}: {value}" for name, value in environment["environment"].items()]
    made += [f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", f"- commit: {commit_name}"]
    made += [f"- **missing**: {text}" for text in environment["missing"]]
    made += ["", "| part | result | seconds | limit |", "|---|---|---|---|"]
    made += [f"| {one.part.name} | {one.result} | {one.seconds:.0f} | {one.part.seconds:.0f} |" for one in outcomes]
    made += [f"\n{total - len(outcomes)} parts were not run."] if len(outcomes) < total else []
    made += benchmarks(rows) + megatron(rows, outcomes)
    for one in outcomes:
        if not one.passed:
            shown = tail(one).splitlines()[-SHOWN_LINES:]
            made += ["", f"## {one.part.name}: {one.result}", "", *(f"    {line}" for line in shown)]
    return made


def benchmarks(rows: Path) -> list[str]:
    """A table for each benchmark, of the rows that it wrote before it ended."""
    grouped: dict[str, list[QueuedRow]] = {}
    for row in records.read(rows, "benchmark"):
        grouped.setdefault(row.pop("benchmark"), []).append(QueuedRow(**row))
    made = []
    for title, table in grouped.items():
        made += ["", f"## Optimizer step, {title}", "", *markdown(table).splitlines()]
    return made


def megatron(rows: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """Comparisons, a table of the runs, and which kernel each says that it uses."""
    runs = records.read(rows, "megatron")
    if not runs:
        return []
    made = ["", "## Megatron", "", *(f"- {record['comparison']}" for record in records.read(rows, "comparison"))]
    made += ["", "| run | parameters | micro-batches | first loss | last loss | ms per micro-batch | peak GB |"]
    made += ["|---|---|---|---|---|---|---|"]
    for run in runs:
        numbers = (run["first_loss"], run["last_loss"], run["milliseconds"], run["peak_gigabytes"])
        cells = " | ".join("-" if value is None else f"{value:.4g}" for value in numbers)
        made.append(f"| {run['megatron']} | {run['parameters']:,} | {run['micro_batches']} | {cells} |")
    return [*made, "", *(f"- {one.part.name}: {line}" for one in outcomes for line in startup_lines(one.log))]


def startup_lines(log: Path) -> list[str]:
    """The lines in which this package says which kernel and storage a run has."""
    printed = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in printed if line.startswith("megatron-lion:") and "kernel" in line]
