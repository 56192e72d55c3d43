"""launch/demo.py with few steps; then the lines that it prints, as a user would paste them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT


def run(line: list[str] | str, *, shell: bool = False) -> str:
    """Run a line outside the clone, without the tests' own variables. Returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_LION_DEVICE"}
    done = subprocess.run(line, shell=shell, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.mark.slow
def test_the_demo_ends_with_files_that_exist_and_lines_that_run(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    line = [sys.executable, str(ROOT / "launch" / "demo.py"), "--output", str(output), "--iterations", "12"]
    said = run([*line, "--batches", "4"])
    assert "killed with SIGKILL at iteration 5; resuming from its checkpoint at 4" in said
    assert "1 of 1 losses after the resume equal the killed run's" in said
    closing = said.partition("== done\n")[2].splitlines()
    assert closing[0] == "Look at"
    files = [Path(text.split()[0]) for text in closing if text.startswith(f"    {output}")]
    assert len(files) == 4 and all(path.is_file() for path in files)
    evaluation, export = [text for text in closing if text.startswith("    MEGATRON_LION_DEVICE=cpu ")]
    assert "| 12 |" in run(evaluation, shell=True)
    run(export, shell=True)
    assert (output / "hf" / "model.safetensors").is_file()
