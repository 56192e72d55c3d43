"""Every figure and table of the paper and ours, after a summary of one page, from what runs left behind.

    python -m tools.paper.report --runs runs --output report

Reads runs/toy (tools/paper/toy_convergence.py), runs/scaling and runs/scaling-bert, runs/rates, runs/rates-10to1 and
runs/rates-vision (the tools of these names), runs/vision/DATASET and runs/vision/digits-100 (of
tools/paper/vision_study.py, the latter with --dataset digits), runs/demo (launch/demo.sh) and every folder in runs with
a recipe.json (launch/launch.py). With --long-runs also the committed records of tools/paper/long_runs.py; with
--exhibits only some figures and tables:

    python -m tools.paper.report --long-runs DIR --exhibits "Figure 2" "Figure 3" "Table A1" --output report

What is missing or damaged is said in its place, with the command that makes it. A table at the end says how long each
long run took. Leaves report.html, which holds all that it needs, and report.md with its pictures in figures/.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from tools.paper.reporting import findings, long_findings, rate_findings, run_times, toy_findings, vision_findings
from tools.paper.reporting.html_page import to_html
from tools.paper.reporting.markdown_page import to_markdown
from tools.paper.reporting.pages import Page, Row
from tools.paper.reporting.paper import EXHIBITS, Exhibit
from tools.paper.studies import long_records

Maker = Callable[[Path, str], findings.Finding]
STUDIED_RATES = ("rates", "rates-10to1")  # SGD at its best rate, and at the paper's 10 times Lion's
TOY = "toy"  # the folder of the runs that have the paper's own setting
# By exhibit: folders that may hold its records, the file that says that they do, and who reads them.
RECORDS: dict[str, list[tuple[str, str, Maker]]] = {
    "Table 1": [(TOY, "result.json", toy_findings.rates)],
    "Figure A1": [(TOY, "result.json", toy_findings.pictures)],
    "Figure A2": [(TOY, "result.json", toy_findings.bound)],
    "Figure A3": [
        *((folder, rate_findings.RECORD, rate_findings.constants) for folder in (*STUDIED_RATES, "rates-vision")),
        *((f"vision/{data}", "", vision_findings.constants) for data in ("cifar100", "digits-100")),
    ],
    "Table A1": [(folder, rate_findings.RECORD, rate_findings.perplexities) for folder in STUDIED_RATES],
    "Section 5": [(folder, "scaling.json", findings.scaling) for folder in ("scaling", "scaling-bert")],
    "Figure 1": [(f"vision/{data}", "", vision_findings.curves) for data in ("cifar100", "digits", "digits-100")],
    "Figure A4": [("vision/cifar10", "", vision_findings.curves)],
    "Figure A5": [("vision/imagenet", "", vision_findings.curves)],
    "Table A2": [
        (f"vision/{data}", vision_findings.GRID, vision_findings.rates_found)
        for data in ("cifar10", "cifar100", "digits")
    ],
}
LANGUAGE_MODELS = {"Figure 2": "bert", "Figure 3": "gpt"}  # a part of their models' names
VERDICTS = (
    "Verdicts. Holds: in all that was measured. Holds in part: in some settings or steps, or for a part of the claim. "
    "Does not hold: the measurements contradict the claim. Not established: they disagree or do not decide. Undecided: "
    "the interval is too wide. Seen (seen in part, not seen) in one seed: with one seed, so without an interval. "
    "Confirmed: in several seeds, with 95 % intervals that exclude 0. Not confirmed: an interval includes 0. The "
    "opposite is found: the intervals exclude 0 on the other side. Above, below, around 0.5: so is the interval of an "
    "exponent. Provisional: planned runs are missing."
)
LONG_RUNS = (
    "The long runs (50,000 steps, and what is compared with them) are made by `python -m tools.paper.long_runs --study "
    "NAME`. Commands, text, every setting that differs from the paper's, and a check of one exact round by float64 "
    "autograd are in docs/results/long-runs.md."
)
# What a damaged or foreign record raises where it is read.
BAD_RECORD = (LionError, KeyError, TypeError, ValueError, IndexError, AttributeError)


def language_pairs(runs: Path) -> dict[str, dict[str, Path]]:
    """The folders of language runs by model, then by optimizer: recipes, the demo, and the studies' first seed."""
    pairs: dict[str, dict[str, Path]] = {}
    for path in sorted(runs.glob("*/recipe.json")):
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["names"]
            model, optimizer = names["model"], names["optimizer"]
        except (ValueError, KeyError, TypeError):  # cut short: the folder's usual name says the same
            model, optimizer, *_ = [*path.parent.name.split("-"), "unknown"]
        # Sorted, the paper's settings (lion_paper) come after tuned ones of the same model (lion) and replace them.
        pairs.setdefault(str(model), {})[str(optimizer).removesuffix("_paper")] = path.parent
    studies = (("the demo's GPT", "demo", ""), ("tiny GPT", "rates", "-1"), ("small BERT", "scaling-bert", "-400"))
    for model, where, suffix in studies:
        folder = runs / where
        found = {name: folder / f"{name}{suffix}" for name in ("lion", "sgd") if (folder / f"{name}{suffix}").is_dir()}
        pairs |= {model: found} if found else {}
    return pairs


def make_row(
    exhibit: Exhibit, runs: Path, hardware: str, pairs: dict[str, dict[str, Path]], long_runs: Path | None = None
) -> Row:
    """What ``runs`` and ``long_runs`` hold of an exhibit.

    A damaged record becomes a problem in words, not the report's end.
    """
    makers: dict[str, Callable[[], findings.Finding | list[findings.Finding]]] = {}  # by where the records are
    if long_runs is not None:
        makers[str(long_runs)] = partial(long_findings.find, exhibit.name, long_runs, hardware)
    for folder, needed, maker in RECORDS.get(exhibit.name, []):
        if (runs / folder / needed).exists():
            makers[str(runs / folder)] = partial(maker, runs / folder, hardware)
    for model, pair in pairs.items():
        if LANGUAGE_MODELS.get(exhibit.name, "none") in model.lower():
            makers[", ".join(map(str, pair.values()))] = partial(findings.language, pair, model, hardware)
    found, problems = [], []
    for where, make in makers.items():
        try:
            made = make()
            found += made if isinstance(made, list) else [made]
        except BAD_RECORD as error:
            text = str(error) if isinstance(error, LionError) else f"{where}: {type(error).__name__}: {error}"
            problems.append(f"{text}. To make it again: {exhibit.command}")
    return Row(exhibit=exhibit, findings=found, problems=problems)


def make_page(rows: list[Row], runs: Path, hardware: str, long_runs: Path | None) -> Page:
    """The whole report: its title, what it is, the rows, and how long the long runs took."""
    there = [row.exhibit.name for row in rows if row.was_run]
    counts = f"{len(there)} of {len(rows)} exhibits have a run here{_listed(there)}."
    command = f"python -m tools.paper.report --runs {runs}" + f" --long-runs {long_runs}" * (long_runs is not None)
    intro = [
        "Dong, Li, Lin (2025), DOI 10.11897/SP.J.1016.2025.02008. The paper's pictures are described, not copied; its "
        "tables and numbers are its own. A verdict is about our model, data and steps only.",
        f"{counts} {_settings(there)}Hardware: {hardware}. Made by `{command} --output DIR`.",
        *([LONG_RUNS] if long_runs is not None else []),
        VERDICTS,
    ]
    try:
        times = run_times.table(long_records.read(long_runs) if long_runs else [])
    except BAD_RECORD:  # which the exhibits that read it say in words
        times = run_times.table([])
    title = "Convergence Rate Analysis of LION: the paper and our runs"
    return Page(title=title, intro=intro, rows=rows, times=times, hardware=hardware)


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _settings(names: list[str]) -> str:
    """Which of the exhibits have the paper's own setting."""
    own = [name for name in names if any(folder == TOY for folder, _, _ in RECORDS.get(name, []))]
    said = f"Only the runs of the toy problem{_listed(own)} have the paper's own setting. " if own else ""
    rest = f"The {'others' if own else 'runs'} are smaller, or on other data, unless their section says otherwise. "
    return said + rest * (len(own) < len(names))


def this_machine() -> str:
    """What the page says of the hardware unless told."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"


def write_report(
    runs: Path, output: Path, hardware: str, long_runs: Path | None = None, exhibits: tuple[str, ...] = ()
) -> list[Row]:
    """Gather, write both pages and return their rows: those of ``exhibits``, or all.

    Raises LionError if ``runs`` is not a folder and ``long_runs`` is not set.
    """
    if long_runs is None and not runs.is_dir():
        raise LionError(f"--runs {runs} is not a folder: give the one that holds toy/, rates/, scaling/ and the others")
    pairs = language_pairs(runs)
    chosen = [exhibit for exhibit in EXHIBITS if exhibit.name in (exhibits or [exhibit.name])]
    rows = [make_row(exhibit, runs, hardware, pairs, long_runs) for exhibit in chosen]
    page = make_page(rows, runs, hardware, long_runs)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.html").write_text(to_html(page), encoding="utf-8")
    (output / "report.md").write_text(to_markdown(page, output), encoding="utf-8")
    return rows


def main() -> None:
    """Write the report and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs (default: %(default)s)")
    add(
        "--output", type=Path, default=Path("report"), metavar="DIR", help="folder for the pages (default: %(default)s)"
    )
    add("--long-runs", type=Path, metavar="DIR", help="records of tools/paper/long_runs.py")
    names = [exhibit.name for exhibit in EXHIBITS]
    add("--exhibits", nargs="+", choices=names, default=[], metavar="NAME", help=f"only these of {', '.join(names)}")
    add("--hardware", metavar="TEXT", help="what the runs were made on (default: this machine)")
    options = parser.parse_args()
    hardware = options.hardware or this_machine()
    for row in write_report(options.runs, options.output, hardware, options.long_runs, tuple(options.exhibits)):
        print(f"{row.exhibit.name:10} {'run here' if row.was_run else 'not run here'}")
        for problem in [*row.problems, *(entry for found in row.findings for entry in found.missing)]:
            print(f"           {problem}")
    print(f"report: {options.output / 'report.html'}, {options.output / 'report.md'}")


if __name__ == "__main__":
    with readable_errors():
        main()
