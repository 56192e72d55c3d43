"""A rehearsal checks ``--load`` and plans ``--save`` from metadata."""

from pathlib import Path

import pytest

from tests.harness import CPU, run_ranks
from tests.rehearse import rehearsals
from tests.rehearse.rehearsals import LION, rehearse, report
from tests.rehearse.test_refusals import reasons

FLAGS = f"{rehearsals.FLAGS} --global-batch-size 16 --hidden-size 256"
TP_2 = "--tensor-model-parallel-size 2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a real run of two data-parallel ranks, in Megatron's default format."""
    folder = tmp_path_factory.mktemp("saved")
    run = run_ranks(FLAGS, LION, CPU, f"--save {folder} --save-interval 1", ranks=2)
    assert run.returncode == 0, run.output[-6000:]
    return folder


def test_a_checkpoint_is_checked_and_its_conversions_are_listed(saved: Path, tmp_path: Path) -> None:
    flags = f"--lion-momentum-dtype int8 --load {saved}"
    loaded = report(tmp_path, FLAGS, LION, flags, rank=0, ranks=8).loaded
    assert loaded is not None
    assert loaded["iteration"] == 1
    assert loaded["converted"] == ["DP 2 to 8", "momentum fp32 to int8"]


def test_a_plan_has_the_bytes_and_the_files_of_the_real_checkpoint(saved: Path, tmp_path: Path) -> None:
    plan = report(tmp_path, FLAGS, LION, "--save nowhere --save-interval 1", rank=0, ranks=2).checkpoint
    files = list((saved / "iter_0000001").glob("*.distcp"))
    planned = sum(plan["whole"].values()) + plan["state_of_stage"]  # type: ignore[index]
    assert sum(path.stat().st_size for path in files) == pytest.approx(planned, rel=0.05)  # each tensor has a header
    assert len(files) == 2 * plan["files_of_rank"]  # type: ignore[index]
    assert not Path("nowhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags", "says"),
    [
        (2, TP_2, "TP 1 to 2"),
        (1, "--optimizer sgd", "optimizer"),
        (1, "--hidden-size 32", "is another one"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    saved: Path, tmp_path: Path, ranks: int, flags: str, says: str
) -> None:
    rehearsed = rehearse(tmp_path, FLAGS, LION, flags, f"--load {saved}", rank=0, ranks=ranks)
    assert rehearsed.returncode == 2, rehearsed.output[-3000:]
    assert says in rehearsed.output
    real = run_ranks(FLAGS, LION, flags, CPU, f"--load {saved}", ranks=ranks)
    assert real.returncode != 0
    if "hidden" not in flags:  # there Megatron's own message is a list of tensors
        assert reasons(rehearsed.output) <= reasons(real.output)
