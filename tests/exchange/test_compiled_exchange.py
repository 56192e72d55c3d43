"""The Triton kernels of the exchange as GPUs get them: compiled without a GPU, and the machine code inspected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--arch", "90", "--formats", "1", "--kernels", "replay_kernel", "replace_kernel"],
        pytest.param(["--arch", "80", "90", "100", "--kernels", "write_kernel", "sum_kernel"], marks=pytest.mark.slow),
        pytest.param(["--arch", "80", "90", "100", "--bits", "32", "64"], marks=pytest.mark.slow),
    ],
    ids=["replay_bf16_sm_90", "reduce", "all"],
)
def test_nothing_is_contracted_flushed_or_spilled_and_accesses_are_wide(arguments, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("compile_exchange.py")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert rows
    for row in rows:
        # A multiply-add rounds once where the update rounds twice, and a flushed denormal is another number.
        assert row["contracted"] == row["flushed"] == row["spills"] == 0, row
        assert row["registers"] <= 128, row
        assert row["vectors"] > 0 or row["kernel"] in ("replace_kernel", "table_kernel"), row
