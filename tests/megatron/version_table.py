"""The table of docs/results/versions.md: what each release of Megatron was found to do."""

import datetime
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.versions import RELEASES, Megatron

MEASURED = re.compile(r"(?s)<!-- measured -->.*<!-- end -->")


@dataclass
class Table:
    """What each release was found to do, feature by feature."""

    cells: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, feature: str, megatron: Megatron, found: str = "works") -> None:
        self.cells.setdefault(feature, {})[megatron.version] = found

    @classmethod
    def of(cls, text: str) -> "Table":
        """The table as it stands in ``text``."""
        table = cls()
        for feature, *cells in re.findall(r"^\| (\S.*?) \|" + r" (.*?) \|" * len(RELEASES) + "$", text, re.MULTILINE):
            table.cells[feature] = {v: cell for v, cell in zip(RELEASES, cells, strict=True) if cell != "-"}
        return table

    def __or__(self, newer: "Table") -> "Table":
        features = {**self.cells, **newer.cells}
        return Table({name: self.cells.get(name, {}) | newer.cells.get(name, {}) for name in features})

    def __str__(self) -> str:
        rows = [f"| | {' | '.join(RELEASES)} |", f"|---|{'---|' * len(RELEASES)}"]
        for feature, found in self.cells.items():
            rows.append(f"| {feature} | {' | '.join(found.get(version, '-') for version in RELEASES)} |")
        return "\n".join(rows)

    def write(self, page: Path) -> None:
        """Put these cells over those of the table on ``page``, with date and commit."""
        text = page.read_text()
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=page.parent
        )
        when = f"Last measured {datetime.date.today()} at {commit.stdout.strip()}, gloo ranks on a CPU:"
        block = f"<!-- measured -->\n{when}\n\n{Table.of(MEASURED.search(text)[0]) | self}\n<!-- end -->"
        page.write_text(MEASURED.sub(lambda _: block, text))
