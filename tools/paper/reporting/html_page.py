"""The report as one HTML page that needs nothing else. Its first printed page is the summary."""

import base64
import html
import re

from tools.paper.reporting.findings import Finding, sentence
from tools.paper.reporting.formulas import to_plain
from tools.paper.reporting.formulas import with_mathml as text
from tools.paper.reporting.pages import SUMMARY_HEAD, Page, Row, summary_cells
from tools.paper.reporting.paper import Table

PHONE = 340  # CSS pixels that a picture has there
# CSS pixels of a picture per point of its SVG: the least that can be read, what two of a row have, the most of one.
SMALLEST, IN_A_PAIR, LARGEST = 0.7, 0.8, 1.6
SVG_WIDTH = re.compile(r'<svg[^>]* width="([\d.]+)pt"')
STYLE = """
:root { color-scheme: light; --line: #d5dae1; --soft: #f4f6f9; --ink: #1d2430; --gray: #5b6675; --blue: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1.2rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0; } h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; color: var(--gray); margin: 0 0 .4rem; }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1.1rem 0; }
p { margin: .5rem 0; }
.paper { background: var(--soft); border-radius: 6px; padding: .8rem; margin-bottom: 1rem; }
.paper table { font-size: .8rem; } .paper th, .paper td { padding: .2rem .5rem; } .paper p { margin: .3rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; justify-content: center; }
figure { margin: 0; flex-grow: 1; flex-shrink: 1; min-width: 0; max-width: 100%; overflow-x: auto; }
figure img { width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { font-size: .85rem; color: var(--gray); }
.scroll { overflow-x: auto; background: linear-gradient(to left, var(--ground, #fff) 50%, transparent) right -1px top /
  2.4rem 100% no-repeat local, linear-gradient(to left, #0002, transparent) right / .8rem 100% no-repeat; }
.paper .scroll { --ground: var(--soft); } table { border-collapse: collapse; font-size: .86rem; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; vertical-align: top; text-align: left; }
th { background: var(--soft); } a { color: var(--blue); }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere; font-size: .85rem; }
math { font-family: "Cambria Math", "STIX Two Math", "Latin Modern Math", math; }
.summary table { width: 100%; font-size: .82rem; line-height: 1.35; } .summary td:first-child { white-space: nowrap; }
.summary .verdict-cell { font-weight: 600; }
.verdict { border-left: 4px solid var(--blue); padding-left: .7rem; margin: .6rem 0; }
.absent { border-left: 4px solid #b0b8c4; padding-left: .7rem; } .wrong { color: #9c2a1b; }
.finding td, .times td { white-space: nowrap; }
.finding + .finding { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: 1rem; }
.made { font-size: .86rem; color: var(--gray); } nav a { margin-right: .8rem; white-space: nowrap; }
@media screen and (max-width: 760px) { body { padding: .7rem; } section { padding: .7rem; }
  .wide figcaption::after { content: " (scroll sideways)"; }
  .summary thead { display: none; } .summary tr, .summary td { display: block; border: 0; padding: .1rem 0; }
  .summary tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .summary td::before { content: attr(data-head) ": "; color: var(--gray); font-weight: 400; } }
@media print { @page { size: A4; margin: 12mm; } body { font-size: 10pt; padding: 0; max-width: none; }
  nav { display: none; } .summary { break-after: page; } .summary, section { border: 0; padding: 0; }
  .summary table { font-size: 7.5pt; line-height: 1.25; margin: .3rem 0; } .summary td { padding: .1rem .3rem; }
  h1 { font-size: 13pt; } h1 ~ p { font-size: 8.5pt; line-height: 1.3; margin: .2rem 0; }
  figure img { min-width: 0 !important; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def to_html(page: Page) -> str:
    """One page; pictures are SVG in data addresses, so that nothing is fetched and nothing clashes.

    Raises ValueError for a formula that :mod:`tools.paper.reporting.formulas` does not know.
    """
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(to_plain(page.title))}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    top = f"<h1>{text(page.title)}</h1>" + "".join(f"<p>{text(line)}</p>" for line in page.intro)
    links = [f'<a href="#{row.anchor}">{text(row.exhibit.name)}</a>' for row in page.rows]
    links.append('<a href="#times">How long the runs take</a>')
    times = f'<h2>How long the runs take</h2><p class="made">{text(page.times_note)}</p>'
    times += _table(page.times) if len(page.times) > 1 else ""
    end = f'<section class="times" id="times">{times}</section>'
    body = f"{top}{_summary(page)}<nav>{' '.join(links)}</nav>{''.join(map(_section, page.rows))}{end}"
    return f"{head}<body>{body}</body></html>\n"


def _summary(page: Page) -> str:
    head = "".join(f"<th>{name}</th>" for name in SUMMARY_HEAD)
    lines = [_summary_line(row, summary_cells(judgement)) for row in page.rows for judgement in row.judgements]
    results = "".join(f"<li>{text(result)}</li>" for result in page.main_results)
    main = f"<ul>{results}</ul>" if results else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<section class="summary" id="summary"><h2>Summary</h2>{main}{table}</section>'


def _summary_line(row: Row, cells: list[str]) -> str:
    """On a phone a line is a block in which each cell says its column's name."""
    link = f'<a href="#{row.anchor}">{text(row.exhibit.name)}</a>'
    named = zip(SUMMARY_HEAD, [link, *map(text, cells)], strict=True)
    return "<tr>" + "".join(f'<td data-head="{name}"{_strong(name)}>{cell}</td>' for name, cell in named) + "</tr>"


def _strong(name: str) -> str:
    return ' class="verdict-cell"' if name == "verdict" else ""


def _section(row: Row) -> str:
    exhibit = row.exhibit
    paper = f"<h3>The paper</h3><p>{text(exhibit.shows)}</p><p>Claim: {text(exhibit.claim)}</p>"
    paper += _table(exhibit.table) if exhibit.table else ""
    ours = "<h3>Ours</h3>" + "".join(map(_finding, row.findings))
    ours += "".join(f'<p class="wrong">{_literal(problem)}</p>' for problem in row.problems)
    if not row.findings:
        ours += f'<p class="absent">Not run here. <code>{_literal(exhibit.command)}</code></p>'
    title = f"{text(exhibit.name)}: {text(exhibit.title)}"
    return f'<section id="{row.anchor}"><h2>{title}</h2><div class="paper">{paper}</div>{ours}</section>'


def _finding(found: Finding) -> str:
    """The verdict first, then what it is about: pictures over the page's width, and tables."""
    pictures = "".join(_picture(caption, svg) for caption, svg in found.pictures.items())
    content = f'<p class="verdict">{text(found.verdict)}</p><p class="made">Made on: {text(found.made)}</p>'
    content += f'<div class="pictures">{pictures}</div>' + "".join(map(_table, found.tables))
    content += "".join(f'<p class="wrong">Missing: {_literal(entry)}</p>' for entry in found.missing)
    title = f"<h4>{text(sentence(found.about))}</h4>" if found.about else ""
    return f'<div class="finding">{title}{content}</div>'


def _picture(caption: str, svg: str) -> str:
    """As wide as there is room for, but no narrower than its letters can be read: on a phone it is scrolled instead."""
    width = float(found[1]) if (found := SVG_WIDTH.match(svg)) else 360.0
    kind = ' class="wide"' if SMALLEST * width > PHONE else ""
    source = f'src="data:image/svg+xml;base64,{base64.b64encode(svg.encode("utf-8")).decode("ascii")}"'
    sizes = f"min-width:{SMALLEST * width:.0f}px;max-width:{LARGEST * width:.0f}px"
    image = f'<img alt="{_literal(to_plain(caption))}" {source} style="{sizes}">'
    content = f"{image}<figcaption>{text(caption)}</figcaption>"
    return f'<figure{kind} style="flex-basis:{IN_A_PAIR * width:.0f}px">{content}</figure>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{text(cell)}</th>" for cell in table[0])
    rows = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in table[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _literal(words: str) -> str:
    """Escaped: a command line or an error message, in which a dollar sign is only that."""
    return html.escape(words)
