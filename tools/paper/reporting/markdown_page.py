"""The report as Markdown, with its pictures as files and formulas as GitHub renders them."""

from pathlib import Path

from tools.paper.reporting.findings import Finding
from tools.paper.reporting.formulas import to_plain
from tools.paper.reporting.pages import SUMMARY_HEAD, Page, Row, summary_cells
from tools.paper.reporting.paper import Table


def to_markdown(page: Page, folder: Path) -> str:
    """The page's text. Its pictures are written to ``folder``/figures."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    lines = [f"# {page.title}", ""]
    for paragraph in page.intro:
        lines += [paragraph, ""]
    lines += ["## Summary", ""]
    lines += [*(f"- {result}" for result in page.main_results), ""] if page.main_results else []
    lines += _summary(page.rows)
    for row in page.rows:
        lines += _section(row, folder)
    lines += ["## How long the runs take", "", page.times_note, ""]
    lines += _table(page.times) if len(page.times) > 1 else []
    return "\n".join(lines).rstrip() + "\n"


def _summary(rows: list[Row]) -> list[str]:
    lines = [[row.exhibit.name, *summary_cells(judgement)] for row in rows for judgement in row.judgements]
    return _table([list(SUMMARY_HEAD), *lines])


def _section(row: Row, folder: Path) -> list[str]:
    exhibit = row.exhibit
    lines = [f"## {exhibit.name}: {exhibit.title}", ""]
    lines += [f"**The paper.** {exhibit.shows} Claim: {exhibit.claim}", ""]
    lines += _table(exhibit.table) if exhibit.table else []
    for number, found in enumerate(row.findings):
        lines += _finding(found, row, number, folder)
    lines += [f"Problem: {_literal(problem)}\n" for problem in row.problems]
    lines += [] if row.findings else [f"**Ours.** Not run here. `{exhibit.command}`", ""]
    return lines


def _finding(found: Finding, row: Row, number: int, folder: Path) -> list[str]:
    title = f"Ours, {found.about}." if found.about else "Ours."
    lines = [f"**{title}** {found.verdict}", "", f"Made on: {found.made}", ""]
    for index, (caption, svg) in enumerate(found.pictures.items()):
        name = f"figures/{row.anchor}-{number}-{index}.svg"
        (folder / name).write_text(svg, encoding="utf-8")
        lines += [f"![{row.exhibit.name}: {to_plain(caption)}]({name})", "", f"*{caption}*", ""]
    for table in found.tables:
        lines += _table(table)
    return lines + [f"Missing: {_literal(entry)}\n" for entry in found.missing]


def _table(table: Table) -> list[str]:
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def _literal(words: str) -> str:
    """Text in which a dollar sign is only that, as in a command line."""
    return words.replace("$", r"\$")
