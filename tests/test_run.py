"""Errors under real torchrun: the reason is printed whichever rank meets it, and once where all ranks meet it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lion.integration.loop.vocabularies import tokenizer_sha256
from tests.harness import BATCH, CPU, CPU_ENVIRONMENT, MODEL, PRETRAIN_GPT, RATE, text_flags

ERROR = "megatron-lion: error: "
# Stands for a training script: each rank checks a file of its own node, then would train for two minutes. SIGTERM is
# handled as under Megatron's --exit-signal-handler.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors

signal.signal(signal.SIGTERM, lambda *_: None)
path = Path(sys.argv[1]) / f"node{os.environ['RANK']}"
with readable_errors():
    if len(path.read_bytes()) != 8:
        raise LionError(f"{path} has {len(path.read_bytes())} bytes, expected 8")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(120)
"""


def start(*words: object) -> "subprocess.Popen[str]":
    """Two ranks of a script under torchrun."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    environment = {**os.environ, **CPU_ENVIRONMENT}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def errors(process: "subprocess.Popen[str]") -> list[str]:
    """Our error lines in the output of a run whose ranks end with status 2, without a traceback of ours."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    assert "exitcode  : 2 " in output, output
    assert "LionError" not in output, output
    return [line for line in output.splitlines() if ERROR in line]


def test_the_reason_is_printed_once_whichever_rank_meets_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for run, sizes in {"rank 1": (8, 7), "both": (7, 7)}.items():
        (tmp_path / run).mkdir()
        for rank, size in enumerate(sizes):
            (tmp_path / run / f"node{rank}").write_bytes(bytes(size))
    started = {run: start(script, tmp_path / run) for run in ("rank 1", "both")}  # together: most of it is waiting

    (line,) = errors(started["rank 1"])
    assert line.startswith(f"{ERROR}[rank 1, {os.uname().nodename}] ")
    assert f"{tmp_path / 'rank 1' / 'node1'} has 7 bytes, expected 8" in line

    (line,) = errors(started["both"])
    assert line.startswith(f"{ERROR}{tmp_path / 'both' / 'node0'} has 7 bytes")


@pytest.mark.slow
def test_data_cut_short_on_one_node_is_named_by_that_nodes_rank(text: Path, tmp_path: Path) -> None:
    """launch/pretrain_gpt.py itself; a wrapper lets each rank read its own copy of the text, as on two nodes."""
    tokenizer = SimpleNamespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=text / "tokenizer.model")
    made_with = {"sha256": tokenizer_sha256(tokenizer), "type": tokenizer.tokenizer_type, "files": []}
    sizes = {path.name: {"bytes": path.stat().st_size} for path in text.glob("train_text_document.*")}
    for rank in (0, 1):
        folder = tmp_path / f"node{rank}"
        shutil.copytree(text, folder)
        (folder / "train_manifest.json").write_text(json.dumps({"files": sizes, "tokenizer": made_with}))
    cut = tmp_path / "node1" / "train_text_document.bin"
    os.truncate(cut, cut.stat().st_size // 2)
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import os, runpy, sys\n"
        f"script, node = {str(PRETRAIN_GPT)!r}, {str(tmp_path / 'node')!r} + os.environ['RANK']\n"
        "sys.argv = [script, *(word.replace('NODE', node) for word in sys.argv[1:])]\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    words = f"{MODEL} {BATCH} {RATE} {CPU} --optimizer lion --train-iters 2 {text_flags(Path('NODE'))}".split()
    (line,) = errors(start(wrapper, *words))
    assert line.startswith(f"{ERROR}[rank 1, {os.uname().nodename}] {cut} has ")
