"""``--optimizer-cpu-offload``: masters and momentum of a fraction of the parameters on the CPU train the same.

"Device" and CPU are one here, so what is tested is which side owns what, and every copy between them; no transfer.
"""

from pathlib import Path

import pytest

from tests.harness import HORIZON, assert_same_checkpoint, pretrain, read_checkpoint, relative_difference
from tests.versions import since, until

DISTRIBUTED = "--optimizer lion --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
OFFLOAD = "--optimizer-cpu-offload --optimizer-offload-fraction"


supported = pytest.mark.supports("`--optimizer-cpu-offload`", "bit for bit a run without it; resumed bit for bit")


@pytest.fixture(scope="module")
def without(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A run without the flag, whose gradients are clipped, and its final checkpoint."""
    folder = tmp_path_factory.mktemp("without")
    flags = f"{DISTRIBUTED} --bf16 --clip-grad 0.3 {HORIZON} --train-iters 6 --save {folder} --save-interval 6"
    return folder, pretrain(text, flags, ranks=2).log


@supported
@since("0.19")
@pytest.mark.parametrize(
    ("fraction", "overlap"),
    [
        pytest.param("0", "", marks=pytest.mark.slow),
        ("0.5", "--overlap-cpu-optimizer-d2h-h2d"),
        pytest.param("1", "", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_offloads_is_resumed_and_equals_one_that_does_not(
    text: Path, tmp_path: Path, without: tuple[Path, object], fraction: str, overlap: str
) -> None:
    flags = f"{DISTRIBUTED} --bf16 --clip-grad 0.3 {HORIZON} {OFFLOAD} {fraction} {overlap} --train-iters 6"
    saving = f"--save {tmp_path} --save-interval 3"
    first = pretrain(text, flags, f"{saving} --exit-interval 3", ranks=2)
    said = next(line for line in first.ours() if "lion on" in line)
    assert ("of it on the CPU" in said) == (fraction != "0")
    resumed = pretrain(text, flags, f"{saving} --load {tmp_path}", ranks=2)
    folder, log = without
    assert min(resumed.log.loss) == 4
    assert relative_difference(first.log, log) == 0.0
    assert relative_difference(resumed.log, log) == 0.0
    assert_same_checkpoint(read_checkpoint(tmp_path, 6), read_checkpoint(folder, 6))


@supported
@since("0.19")
@pytest.mark.slow
def test_a_checkpoint_goes_from_a_run_that_offloads_to_one_that_does_not_and_back(text: Path, tmp_path: Path) -> None:
    flags = f"--optimizer lion --use-distributed-optimizer --bf16 {HORIZON} --train-iters 9"
    offload, saving = f"{OFFLOAD} 0.5", f"--save {tmp_path} --save-interval 3"
    whole = pretrain(text, flags).log
    pretrain(text, flags, offload, saving, "--exit-interval 3")
    pretrain(text, flags, saving, f"--load {tmp_path} --exit-interval 6")
    last = pretrain(text, flags, offload, f"--load {tmp_path}").log
    assert min(last.loss) == 7
    assert relative_difference(last, whole) == 0.0


@supported
@since("0.19")
@pytest.mark.slow
def test_weights_loaded_without_their_optimizer_reach_the_masters_on_both_sides(text: Path, tmp_path: Path) -> None:
    flags = f"--optimizer lion --use-distributed-optimizer --bf16 {HORIZON} --train-iters 6"
    pretrain(text, flags, f"--save {tmp_path} --save-interval 3 --exit-interval 3")
    loaded = [pretrain(text, flags, f"--load {tmp_path} --no-load-optim", more).log for more in ("", f"{OFFLOAD} 0.5")]
    assert relative_difference(*loaded) == 0.0


@supported
@since("0.19")
@pytest.mark.slow
def test_an_adam_checkpoint_is_continued_the_same_with_a_part_on_the_cpu(text: Path, tmp_path: Path) -> None:
    flags = f"--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --bf16 {HORIZON} --train-iters 6"
    pretrain(text, flags, f"--optimizer adam --save {tmp_path} --save-interval 3 --exit-interval 3", ranks=2)
    lion = "--optimizer lion --lion-init-from adam --override-opt_param-scheduler --lr 5e-5 --min-lr 5e-6"
    logs = []
    for name, more in (("whole", ""), ("part", f"{OFFLOAD} 0.5")):
        run = pretrain(
            text, flags, lion, more, f"--load {tmp_path} --save {tmp_path / name} --save-interval 6", ranks=2
        )
        assert "continuing an Adam run" in run.output
        logs.append(run.log)
    assert relative_difference(*logs) == 0.0
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 6), read_checkpoint(tmp_path / "part", 6))


@since("0.19")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "--use-distributed-optimizer --bf16 --lion-momentum-dtype bf16",
            "is not supported with --optimizer-cpu-offload",
        ),
        ("--use-distributed-optimizer", "--optimizer-cpu-offload is not supported in fp32"),
        ("--bf16", "--optimizer-cpu-offload needs --use-distributed-optimizer"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(text: Path, more: str, said: str) -> None:
    run = pretrain(text, f"--optimizer lion {OFFLOAD} 0.5 {more} --train-iters 2", kill_at=2)
    assert run.returncode not in (0, -9)
    assert said in run.output


@pytest.mark.refuses("`--optimizer-cpu-offload`")
@until("0.18")
def test_it_is_refused_where_it_has_not_been_made_to_work(text: Path) -> None:
    run = pretrain(text, f"{DISTRIBUTED} --bf16 {OFFLOAD} 0.5 --train-iters 2", kill_at=2)
    assert run.returncode not in (0, -9)
    assert "--optimizer-cpu-offload is supported with Lion from megatron-core 0.19 on" in run.output
