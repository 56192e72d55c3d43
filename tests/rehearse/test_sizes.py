"""A rehearsed rank holds the bytes that a real one holds."""

from pathlib import Path

import pytest

from tests.harness import CPU
from tests.rehearse.rehearsals import FLAGS, KINDS, LION, real_sizes, report

TP_2, PP_2 = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --disable-bias-linear "
    "--expert-model-parallel-size 2"
)
INT8 = "--lion-momentum-dtype int8 --lion-master-weights remainder"
SMALL = "--lion-momentum-dtype bf16 --lion-master-weights remainder --grad-reduce-in-bf16"


def assert_equal_bytes(folder: Path, ranks: int, *flags: str) -> None:
    real = real_sizes(folder, FLAGS, LION, *flags, CPU, ranks=ranks)
    for rank, held in enumerate(real):
        rehearsed = report(folder, FLAGS, LION, *flags, rank=rank, ranks=ranks)  # with Transformer Engine's flags
        assert {kind: rehearsed.sizes[kind] for kind in KINDS} == held
        assert rehearsed.real_memory == ""


@pytest.mark.parametrize(("ranks", "flags"), [(2, INT8), (2, PP_2)])
def test_a_rehearsed_rank_has_the_bytes_of_a_real_one(tmp_path: Path, ranks: int, flags: str) -> None:
    assert_equal_bytes(tmp_path, ranks, flags)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["", SMALL, INT8])
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ""),
        (2, ""),
        (4, ""),
        (8, "--global-batch-size 16"),
        (2, TP_2),
        (2, f"{PP_2} --overlap-grad-reduce"),
        (2, EXPERTS),
    ],
)
def test_a_rehearsed_rank_has_the_bytes_of_a_real_one_in_every_layout(
    tmp_path: Path, ranks: int, flags: str, storage: str
) -> None:
    assert_equal_bytes(tmp_path, ranks, flags, storage)
