"""Real runs on gloo ranks, and rehearsals of the same command line."""

import json
from pathlib import Path
from typing import Any

from megatron_lion.integration.rehearsal.one_rank import RankReport
from tests.harness import BATCH, MODEL, PRETRAIN_GPT, RATE, Run, run_ranks

FOLDER = Path(__file__).parent
# Tokens without a tokenizer's files. Everything that a run needs but a GPU's flags.
FLAGS = f"{MODEL} {BATCH} {RATE} --tokenizer-type NullTokenizer --vocab-size 500 --mock-data --train-iters 1 --bf16"
LION = "--optimizer lion --use-distributed-optimizer"
KINDS = ("parameters", "weights", "gradients", "momentum", "masters")


def rehearse(folder: Path, *flags: str, rank: int, ranks: int, steps: int = 0, script: Path = PRETRAIN_GPT) -> Run:
    """Rehearse ``rank`` of ``ranks``; its report is left in ``folder``."""
    where = f"{rank} {ranks} {steps} {script}"
    return run_ranks(where, *flags, script=FOLDER / "rehearsed_ranks.py", environment={"SIZES": str(folder)})


def report(folder: Path, *flags: str, rank: int, ranks: int, steps: int = 0) -> RankReport:
    """The report of :func:`rehearse`, which must succeed."""
    run = rehearse(folder, *flags, rank=rank, ranks=ranks, steps=steps)
    assert run.returncode == 0, run.output[-6000:]
    return RankReport(**json.loads((folder / f"rehearsed-{rank}.json").read_text(encoding="utf-8")))


def real_sizes(folder: Path, *flags: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank of a real run held after its first step."""
    run = run_ranks(*flags, ranks=ranks, script=FOLDER / "real_rank.py", environment={"SIZES": str(folder)})
    assert run.returncode == 0, run.output[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
