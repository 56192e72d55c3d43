"""Each text tool as its user runs it: --help at once, and a wrong request as one line with exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def run(tool: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *arguments], capture_output=True, text=True, cwd=folder, timeout=60
    )


@pytest.mark.parametrize(
    ("tool", "flag", "wrong", "message"),
    [
        (
            "prepare_text.py",
            "--split-sentences",
            ["--input", "none.jsonl", "--output-prefix", "x", "--tokenizer-type", "GPT2BPETokenizer"],
            "--input none.jsonl: no such file",
        ),
        (
            "train_tokenizer.py",
            "--vocab-size",
            ["--input", "none.txt", "--output", "x", "--tokenizer-type", "GPT2BPETokenizer", "--vocab-size", "300"],
            "--input none.txt: no such file",
        ),
        (
            "eval_wikitext103.py",
            "--overlapping-eval",
            ["--checkpoints", "none"],
            "--checkpoints none has no complete",
        ),
        ("export_hf.py", "--step", ["--checkpoints", "none", "--output", "x"], "--checkpoints none has no complete"),
    ],
)
def test_help_and_a_wrong_request(tool: str, flag: str, wrong: list[str], message: str, tmp_path: Path) -> None:
    usage = run(tool, "--help", folder=tmp_path)
    assert usage.returncode == 0 and flag in usage.stdout
    refused = run(tool, *wrong, folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and refused.stderr.startswith("megatron-lion: error: ")
    assert message in refused.stderr
    assert not list(tmp_path.iterdir())
