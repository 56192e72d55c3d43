"""A set-up that the cluster would refuse is refused in a rehearsal, with the message of the real run."""

import re
from pathlib import Path

import pytest

from tests.harness import CPU, run_ranks
from tests.rehearse.rehearsals import FLAGS, LION, rehearse

# The line that says why, of this package or of Megatron.
REASON = re.compile(r"(megatron-lion: error: .*|\b\w+(?:Error|Exception)\b.*)")

IN_CI = {
    "layers that the pipeline does not divide": (2, "--pipeline-model-parallel-size 2 --num-layers 3"),
    "a misspelled option of Lion": (1, "--lion-momentum-dtype int4"),
}
OTHERS = {
    "ranks that the layout does not divide": (3, "--tensor-model-parallel-size 2"),
    "heads that tensor parallelism does not divide": (2, "--tensor-model-parallel-size 2 --num-attention-heads 3"),
    "a batch that the replicas do not divide": (2, "--micro-batch-size 3"),
    "experts that expert parallelism does not divide": (2, "--num-experts 3 --expert-model-parallel-size 2"),
    "positions that are too few": (1, "--max-position-embeddings 16"),
    "a rate above its bound": (1, "--min-lr 1e-2"),
    "Megatron-FSDP": (1, "--use-megatron-fsdp --no-gradient-accumulation-fusion"),
    "two precisions": (1, "--fp16"),
    "a vocabulary file that is missing": (1, "--tokenizer-type GPT2BPETokenizer --vocab-file none --merge-file none"),
}


def reasons(output: str) -> set[str]:
    """The lines of ``output`` that say why it ended, without the name of the rank."""
    return {found[0].strip() for line in output.splitlines() if (found := REASON.search(line))}


def assert_refused_alike(folder: Path, ranks: int, flags: str, steps: int = 0) -> None:
    real = run_ranks(FLAGS, LION, flags, CPU, ranks=ranks)
    rehearsed = rehearse(folder, FLAGS, LION, flags, rank=0, ranks=ranks, steps=steps)
    assert real.returncode != 0
    assert rehearsed.returncode != 0, rehearsed.output[-2000:]
    said = reasons(rehearsed.output)
    assert said, rehearsed.output[-2000:]
    assert said <= reasons(real.output), real.output[-3000:]
    assert not list(folder.glob("rehearsed-*.json"))


@pytest.mark.parametrize("case", IN_CI)
def test_a_broken_setup_is_refused_as_by_the_real_run(tmp_path: Path, case: str) -> None:
    assert_refused_alike(tmp_path, *IN_CI[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_broken_setups_are_refused_as_by_the_real_run(tmp_path: Path, case: str) -> None:
    assert_refused_alike(tmp_path, *OTHERS[case])


@pytest.mark.slow
def test_a_step_that_fails_is_found_with_steps(tmp_path: Path) -> None:
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 31"
    assert_refused_alike(tmp_path, 2, flags, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ("--fp8-format hybrid --fp8-param-gather", "--fp8-param-gather"),
        ("--moe-single-grouped-weight", "--moe-single-grouped-weight"),
        ("--optimizer muon", "--optimizer muon"),
        ("--optimizer adam --use-precision-aware-optimizer", "--use-precision-aware-optimizer"),
    ],
)
def test_what_has_no_replacement_without_a_gpu_is_refused(tmp_path: Path, flags: str, flag: str) -> None:
    run = rehearse(tmp_path, FLAGS, LION, "--global-batch-size 16", flags, rank=0, ranks=8)
    assert f"megatron-lion: error: {flag} cannot be rehearsed" in run.output
    assert run.returncode == 2
