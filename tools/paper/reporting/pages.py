"""The report as one HTML page that needs nothing else, and as Markdown with its pictures beside it."""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

from tools.paper.reporting.findings import Finding
from tools.paper.reporting.paper import Exhibit, Table

PHONE = 340  # CSS pixels that a picture has there
SVG_WIDTH = re.compile(r'<svg[^>]* width="([\d.]+)pt"')
STYLE = """
:root { color-scheme: light; --line: #d5dae1; --soft: #f4f6f9; --ink: #1d2430; --blue: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 1.2rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; color: #5b6675; margin: 0 0 .4rem; }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1.1rem 0; }
.pair { display: grid; grid-template-columns: minmax(0, 9fr) minmax(0, 11fr); gap: 1.2rem; align-items: start; }
.paper { background: var(--soft); border-radius: 6px; padding: .8rem; position: sticky; top: .6rem; }
.paper table { font-size: .8rem; } .paper th, .paper td { padding: .2rem .4rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; flex-grow: 1; flex-shrink: 1; min-width: 0; max-width: 100%; overflow-x: auto; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #5b6675; }
.scroll { overflow-x: auto; background: linear-gradient(to left, var(--ground, #fff) 50%, transparent) right -1px top /
  2.4rem 100% no-repeat local, linear-gradient(to left, #0002, transparent) right / .8rem 100% no-repeat; }
.paper .scroll { --ground: var(--soft); } table { border-collapse: collapse; font-size: .86rem; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; vertical-align: top; text-align: left; }
th { background: var(--soft); } code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px;
  overflow-wrap: anywhere; font-size: .85rem; }
.verdict { border-left: 4px solid var(--blue); padding-left: .7rem; margin: .6rem 0; }
.absent { border-left: 4px solid #b0b8c4; padding-left: .7rem; } .wrong { color: #9c2a1b; }
.finding td { white-space: nowrap; }
.finding + .finding { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: 1rem; }
.made { font-size: .86rem; color: #5b6675; } nav a { margin-right: .8rem; white-space: nowrap; color: var(--blue); }
@media (max-width: 760px) { .pair { grid-template-columns: minmax(0, 1fr); } body { padding: .7rem; }
  section { padding: .7rem; } .paper { position: static; } .wide figcaption::after { content: " (scroll sideways)"; } }
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An exhibit, with what was found of it, or why nothing was."""

    exhibit: Exhibit
    findings: list[Finding]
    problems: list[str]

    @property
    def was_run(self) -> bool:
        """Whether a run has finished that says something of it."""
        return any(found.tables or found.pictures for found in self.findings)

    @property
    def anchor(self) -> str:
        return self.exhibit.name.lower().replace(" ", "-")


def to_html(rows: list[Row], intro: list[str]) -> str:
    """One page; pictures are SVG in data addresses, so that nothing is fetched and nothing clashes."""
    links = " ".join(f'<a href="#{row.anchor}">{_text(row.exhibit.name)}</a>' for row in rows)
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(intro[0])}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    top = f"<h1>{_text(intro[0])}</h1>" + "".join(f"<p>{_text(line)}</p>" for line in intro[1:])
    return f"{head}<body>{top}<nav>{links}</nav>{''.join(map(_section, rows))}</body></html>\n"


def _section(row: Row) -> str:
    exhibit = row.exhibit
    paper = f"<h3>The paper</h3><p>{_text(exhibit.shows)}</p><p>Claim: {_text(exhibit.claim)}</p>"
    paper += _html_table(exhibit.table) if exhibit.table else ""
    ours = "<h3>Ours</h3>" + "".join(map(_html_finding, row.findings))
    ours += "".join(f'<p class="wrong">{_text(problem)}</p>' for problem in row.problems)
    if not row.findings:
        ours += f'<p class="absent">Not run here. <code>{_text(exhibit.command)}</code></p>'
    title = f"{_text(exhibit.name)}: {_text(exhibit.title)}"
    pair = f'<div class="pair"><div class="paper">{paper}</div><div>{ours}</div></div>'
    return f'<section id="{row.anchor}"><h2>{title}</h2>{pair}</section>'


def _html_finding(found: Finding) -> str:
    pictures = "".join(_html_picture(caption, svg) for caption, svg in found.pictures.items())
    text = f'<div class="finding"><div class="pictures">{pictures}</div>' + "".join(map(_html_table, found.tables))
    text += f'<p class="verdict">{_text(found.verdict)}</p><p class="made">Made on: {_text(found.made)}</p>'
    return text + "".join(f'<p class="wrong">Missing: {_text(entry)}</p>' for entry in found.missing) + "</div>"


def _html_picture(caption: str, svg: str) -> str:
    """As wide as there is room for, but no narrower than its letters can be read: on a phone it is scrolled instead."""
    width = float(found[1]) if (found := SVG_WIDTH.match(svg)) else 360.0
    kind = ' class="wide"' if 0.7 * width > PHONE else ""
    source = f'src="data:image/svg+xml;base64,{_base64(svg)}"'
    image = f'<img alt="{_text(caption)}" {source} style="min-width:{0.7 * width:.0f}px">'
    text = f"{image}<figcaption>{_text(caption)}</figcaption>"
    return f'<figure{kind} style="flex-basis:{0.8 * width:.0f}px">{text}</figure>'


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table[0])
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(text)


def _base64(svg: str) -> str:
    return base64.b64encode(svg.encode("utf-8")).decode("ascii")


def to_markdown(rows: list[Row], intro: list[str], folder: Path) -> str:
    """The same as Markdown; pictures go to ``folder``/figures."""
    lines = [f"# {intro[0]}", "", *(part for line in intro[1:] for part in (line, ""))]
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for row in rows:
        exhibit = row.exhibit
        lines += [
            f"## {exhibit.name}: {exhibit.title}",
            "",
            f"**The paper.** {exhibit.shows} Claim: {exhibit.claim}",
            "",
        ]
        lines += _markdown_table(exhibit.table) if exhibit.table else []
        for number, found in enumerate(row.findings):
            lines += [f"**Ours.** {found.verdict}", "", f"Made on: {found.made}", ""]
            for index, (caption, svg) in enumerate(found.pictures.items()):
                name = f"figures/{row.anchor}-{number}-{index}.svg"
                (folder / name).write_text(svg, encoding="utf-8")
                lines += [f"![{exhibit.name}: {caption}]({name})", ""]
            for table in found.tables:
                lines += _markdown_table(table)
            lines += [f"Missing: {entry}\n" for entry in found.missing]
        lines += [f"Problem: {problem}\n" for problem in row.problems]
        lines += [] if row.findings else [f"**Ours.** Not run here. `{exhibit.command}`", ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table) -> list[str]:
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]
