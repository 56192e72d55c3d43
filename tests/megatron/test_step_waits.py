"""How often one step of Megatron's optimizer waits for the device, and that it runs the kernels named at the start.

A GPU's queue runs empty while the host waits. Counted on CPU ranks, where the same calls are made.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import BATCH, CPU, MODEL, RATE, run_ranks, text_flags
from tests.versions import since

SCRIPT = Path(__file__).with_name("counted_step.py")
DISTRIBUTED = "--optimizer lion --use-distributed-optimizer --clip-grad 0.3 --train-iters 4"


def counted(text: Path, folder: Path, what: str, flags: str) -> list[dict[str, Any]]:
    """What each rank of a run with ``flags`` counted."""
    common = (MODEL, BATCH, RATE, CPU, text_flags(text), DISTRIBUTED, flags)
    run = run_ranks(what, *common, ranks=2, script=SCRIPT, environment={"PROBE_OUTPUT": str(folder)})
    assert run.returncode == 0, run.output[-6000:]
    answers = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    for answer in answers:
        assert answer["expected"] == answer["kinds"], "the start-up line was about other kernels than those that ran"
    return answers


@pytest.mark.parametrize(
    "flags",
    [
        "--bf16 --lion-momentum-dtype int8 --lion-master-weights remainder --grad-reduce-in-bf16",
        pytest.param("--lion-momentum-dtype bf16", marks=pytest.mark.slow),
        pytest.param("--bf16", marks=pytest.mark.slow),
        pytest.param("--bf16 --grad-reduce-in-bf16", marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_only_for_megatrons_norm(text: Path, tmp_path: Path, flags: str) -> None:
    for answer in counted(text, tmp_path, "number", flags):
        assert answer["waits"][1:] == [0, 0, 0], "only the first step may ask whether ranks must agree in later ones"
        assert answer["copies from the host"][1:] == [0, 0, 0]
        assert min(answer["of the norm"]) >= 1


@since("0.19")
def test_tensor_parallel_ranks_wait_once_for_the_gradients_that_the_norm_leaves_out(text: Path, tmp_path: Path) -> None:
    """Norm, clip factor and the answer of all ranks are read together. Here the norm itself waits for nothing."""
    flags = "--lion-momentum-dtype bf16 --tensor-model-parallel-size 2"
    for answer in counted(text, tmp_path, "tensor", flags):
        assert answer["of the norm"] == [0, 0, 0, 0]
        assert answer["waits"][1:] == [1, 1, 1]
        assert answer["copies from the host"][1:] == [0, 0, 0]
