"""Run in a forked process: rehearses one rank of a run, and leaves its report.

    rehearsed_ranks.py RANK WORLD_SIZE STEPS SCRIPT <flags>

The file is SIZES/rehearsed-RANK.json. A refusal is printed as ``megatron-lion rehearse`` prints it.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_lion import run
from megatron_lion.integration.rehearsal import one_rank


def main() -> None:
    rank, world_size, steps = map(int, sys.argv[1:4])
    script, *flags = sys.argv[4:]
    run.GRACE_SECONDS = 0.0
    with run.readable_errors():
        report = one_rank.rehearse(script, flags, rank=rank, world_size=world_size, steps=steps)
    path = Path(os.environ["SIZES"]) / f"rehearsed-{rank}.json"
    path.write_text(json.dumps(asdict(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
