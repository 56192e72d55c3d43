"""The benchmark of the exchange runs, and names every pass of every format."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "benchmark" / "exchange.py"


def test_every_pass_of_every_format_is_timed():
    command = [sys.executable, str(TOOL), "--parameters", "1000", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 4 * 3 and all(float(row[-3]) > 0 and float(row[-1]) > 0 for row in rows)
