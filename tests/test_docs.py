"""Links and named files of the Markdown pages exist, and the site's navigation has every page."""

import re
from pathlib import Path

import pytest

import megatron_lion
from tests import doc_commands
from tools import api_page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = sorted([*(ROOT / name for name in TOP), *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path from the repository's root, or the module that `python -m` runs.
PATH = re.compile(r"(?<![\w./-])(?:docs|megatron_lion|launch|configs|tools|tests)/[\w./*-]*\w")
MODULE = re.compile(r"-m ((?:tools|megatron_lion)(?:\.\w+)+)")
# Tables that tests write name files as they were when the tests ran.
GENERATED = re.compile(r"<!-- (?:made by|measured|support table).*?<!-- end.*?-->", re.DOTALL)
# Paths in the layouts of architecture.md and CONTRIBUTING.md may start at one of these.
BASES = ("", "megatron_lion", "megatron_lion/integration")
LAYOUT = re.compile(r"`([\w./-]+/[\w-]+\.(?:py|sh|template))`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and mkdocs make of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of ``page`` to a file or heading that does not exist; in docs/ also those out of docs/."""
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        leaves_the_site = page.is_relative_to(DOCS) and not target.is_relative_to(DOCS)
        if not target.is_file() or leaves_the_site or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_files(text: str) -> list[str]:
    """Paths and modules of this repository that ``text`` names and that do not exist."""
    text = GENERATED.sub("", text)
    missing = [path for path in PATH.findall(text) if not any(ROOT.glob(path))]
    for module in MODULE.findall(text):
        file = ROOT / module.replace(".", "/")
        if not (file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()):
            missing.append(module)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_of_the_repository_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = text.partition("### Moved")[0]  # the tables below it name the old paths
    assert missing_files(text) == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_of_the_described_layout_exist(page: str) -> None:
    named = LAYOUT.findall((ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert [path for path in named if not any((ROOT / base / path).exists() for base in BASES)] == []


def test_every_page_is_in_the_navigation_and_the_index() -> None:
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    navigation = re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted(pages)
    assert pages - {"README.md"} <= set(LINK.findall((DOCS / "README.md").read_text(encoding="utf-8")))


def test_the_api_page_has_every_public_name() -> None:
    headings = re.findall(r"^## (megatron_lion\.\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"megatron_lion.{name}" for name in megatron_lion.__all__} - {"megatron_lion.__version__"} <= set(headings)


def test_the_api_page_is_what_its_tool_writes() -> None:
    assert (DOCS / "api.md").read_text(encoding="utf-8") == api_page.page()


def test_commands_are_found_in_blocks_and_in_the_text() -> None:
    text = "Use `megatron-lion doctor` or `lr`.\n```bash\npip install .  # here\ntorchrun \\\n    a.py\n```\n"
    assert list(doc_commands.commands(text)) == ["pip install .", "torchrun a.py", "megatron-lion doctor"]


def test_pages_that_the_code_names_exist() -> None:
    named = set()
    for folder in ("megatron_lion", "launch", "configs", "tools", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".yaml", ".cpp", ".h"):
                named.update(re.findall(r"\bdocs/[\w./-]+\.md\b", path.read_text(encoding="utf-8")))
    assert named
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []


def test_a_broken_link_and_a_missing_file_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](page.md#one-heading) [b](page.md#other) [c](gone.md) [d](https://example.org)")
    assert broken_links(page) == ["page.md#other", "gone.md"]
    text = "`tools/watch.py`, `tools/gone.py`, `configs/*.none`, python -m tools.paper.report, -m tools.paper.gone"
    assert missing_files(text) == ["tools/gone.py", "configs/*.none", "tools.paper.gone"]
