"""The benchmark of the exchange runs, and names every pass of every format."""

import subprocess
import sys


def test_every_pass_of_every_format_is_timed():
    command = [sys.executable, "-m", "tools.benchmark.exchange", "--parameters", "1000", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 4 * 3 + 3 * 2 and all(float(row[-3]) > 0 and float(row[-1]) > 0 for row in rows)
