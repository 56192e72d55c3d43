"""What kills a run or its files at night: afterwards nothing is lost, and nothing is wrong without a word."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_lion.config import LionError
from megatron_lion.integration.checkpoint.integrity import (
    DamagedRecord,
    complete_iterations,
    read_errors_named,
    recovery_hint,
    verify_crc,
)
from tests.harness import (
    ASYNC_SAVE,
    BATCH,
    CPU,
    HORIZON,
    MODEL,
    RATE,
    WORKERS,
    assert_same_checkpoint,
    pretrain,
    read_checkpoint,
    text_flags,
    torchrun,
)

# Parameter by parameter, instead of in buckets whose padding is never initialized.
RUN = f"--optimizer lion --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --bf16 {HORIZON}"
LAST = 8
TRACKER = "latest_checkpointed_iteration.txt"

# ---- killed at any moment ----


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final checkpoint of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pretrain(text, RUN, f"--train-iters {LAST} --save {folder} --save-interval {LAST}", ranks=2)
    return read_checkpoint(folder, LAST)


def unfinished(folder: Path) -> int | None:
    """The iteration whose save the kill cut off: written in part, or not yet named as the latest."""
    latest = int((folder / TRACKER).read_text()) if (folder / TRACKER).exists() else 0
    return next((i for path in folder.glob("iter_*") if (i := int(path.name[5:])) > latest), None)


@pytest.mark.supports(
    "SIGKILL of one rank or of all at a random moment, also inside a save",
    "resumed, the final checkpoint equals an uninterrupted run's bit for bit",
)
# One rank is killed at the even moments, both at the odd ones; every third run saves in the background.
@pytest.mark.parametrize("moment", [pytest.param(i, marks=[pytest.mark.slow] * (i > 0)) for i in range(40)])
def test_a_run_killed_at_a_random_moment_and_resumed_ends_as_if_nothing_had_happened(
    text: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor], moment: int, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(moment)
    run = f"{RUN} {WORKERS} --train-iters {LAST} --save {tmp_path} --load {tmp_path} --save-interval 1"
    if moment % 3 == 2:
        run += f" {ASYNC_SAVE}"
    kill = {"kill_at": dice.randrange(1, LAST), "kill_after": dice.uniform(0.0, 0.6)}
    killed = pretrain(text, run, ranks=2, kill_rank=None if moment % 2 else 1, **kill)
    cut = unfinished(tmp_path)
    start = time.monotonic()
    resumed = pretrain(text, run, ranks=2)
    seconds = time.monotonic() - start
    with capsys.disabled():
        where = f"in the save of iteration {cut}" if cut else f"after iteration {max(killed.log.loss)}"
        first = min(resumed.log.loss, default=LAST)
        print(f"\nmoment {moment}: killed {where}, resumed at {first}, {LAST - first + 1} steps in {seconds:.1f} s")
    # Where rank 1 is killed, rank 0 may end first, at the connection that it lost.
    assert killed.returncode != 0 or max(killed.log.loss) == LAST, killed.output[-3000:]
    assert_same_checkpoint(undisturbed, read_checkpoint(tmp_path, LAST))


@pytest.mark.supports(
    "`torchrun --max-restarts`",
    "one rank killed: the final checkpoint equals an uninterrupted run's bit for bit",
)
@pytest.mark.slow
def test_torchruns_own_restart_brings_a_run_back(
    text: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    save = f"--train-iters {LAST} --save {tmp_path} --load {tmp_path} --save-interval 2"
    flags = (MODEL, BATCH, RATE, CPU, text_flags(text), RUN, WORKERS, save)
    # Else torch 2.13 keeps the store of the first attempt, in which the second one finds the dead ranks' addresses.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = "--max-restarts 1"
    run = torchrun(*flags, ranks=2, kill_at=5, kill_rank=1, launcher=launcher, environment=environment)
    assert run.returncode == 0, run.output[-6000:]
    assert run.output.count("megatron-lion: lion on") == 2, "it was not started again"
    assert_same_checkpoint(undisturbed, read_checkpoint(tmp_path, LAST))


# ---- damaged files ----


@pytest.fixture(scope="module")
def saved(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    pretrain(text, RUN, f"--train-iters 4 --save {folder} --save-interval 2", ranks=2)
    return folder


def place_of(folder: Path, iteration: int, key: str) -> tuple[Path, int, int]:
    """File, offset and length of a record that belongs to a tensor with ``key`` in its name."""
    checkpoint = folder / f"iter_{iteration:07d}"
    places = FileSystemReader(checkpoint).read_metadata().storage_data
    place = next(places[index] for index in sorted(places, key=str) if key in index.fqn)
    return checkpoint / place.relative_path, place.offset, place.length


def flip(folder: Path, key: str) -> str:
    """Turn one bit in the middle of a tensor, or of the common state. Returns the file's name."""
    common = folder / "iter_0000004" / "common.pt"  # before 0.19 a file of its own
    if key == "common_state" and common.is_file():
        path, offset, length = common, 0, common.stat().st_size
    else:
        path, offset, length = place_of(folder, 4, key)
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 1
    path.write_bytes(data)
    return path.name


def cut_short(folder: Path, key: str) -> str:
    """End a file inside a tensor."""
    path, offset, length = place_of(folder, 4, key)
    os.truncate(path, offset + length // 2)
    return path.name


def remove(folder: Path, key: str) -> str:
    path, _, _ = place_of(folder, 4, key)
    path.unlink()
    return path.name


def cut_metadata(folder: Path, key: str) -> str:
    path = folder / "iter_0000004" / ".metadata"
    os.truncate(path, path.stat().st_size // 2)
    return "iter_0000004"


def empty_tracker(folder: Path, key: str) -> str:
    (folder / TRACKER).write_text("")
    return f"{TRACKER} contains ''"


DAMAGE: dict[str, tuple[Callable[[Path, str], str], str, bool]] = {
    "a flipped bit in the momentum": (flip, "exp_avg", False),
    "a flipped bit in the master weights": (flip, "optimizer.state.param", True),
    "a flipped bit in the weights": (flip, "decoder.layers.mlp.linear_fc1.weight", True),
    "a flipped bit in the common state": (flip, "common_state", True),
    "a shard cut short": (cut_short, "exp_avg", True),
    "a shard that is gone": (remove, "exp_avg", False),
    "metadata cut short": (cut_metadata, "", True),
    "an empty tracker file": (empty_tracker, "", False),
}


@pytest.mark.supports(
    "a flipped bit, a truncated or missing file of a `torch_dist` checkpoint",
    "refused with the file's name and the checkpoints to go back to",
)
@pytest.mark.parametrize(
    ("damage", "key"),
    [pytest.param(do, key, id=name, marks=[pytest.mark.slow] * slow) for name, (do, key, slow) in DAMAGE.items()],
)
def test_damage_is_named_with_the_checkpoint_to_go_back_to(
    text: Path, saved: Path, tmp_path: Path, damage: Callable[[Path, str], str], key: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    named = damage(folder, key)
    run = pretrain(text, RUN, f"--train-iters 4 --load {folder}", ranks=2, kill_at=99)
    assert run.returncode not in (0, -9), run.output[-3000:]
    assert not run.log.loss, "it trained on damaged state"
    lines = [line for line in run.output.splitlines() if "megatron-lion: error:" in line]
    assert lines, run.output[-3000:]
    assert named in lines[0]
    assert "--ckpt-step (2" in lines[0]


def test_the_checkpoint_before_a_damaged_one_still_loads(text: Path, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    flip(folder, "exp_avg")
    pretrain(text, RUN, f"--train-iters 4 --load {folder} --ckpt-step 2 --save {tmp_path} --save-interval 4", ranks=2)
    assert_same_checkpoint(read_checkpoint(saved, 4), read_checkpoint(tmp_path, 4))


def test_torch_alone_reads_a_flipped_bit_without_a_word(saved: Path, tmp_path: Path) -> None:
    """Why the check is here: this is what Megatron would train on."""
    shutil.copytree(saved, tmp_path / "damaged")
    flip(tmp_path / "damaged", "exp_avg")
    with pytest.raises(AssertionError, match=r"1 of .* tensors differ"):
        assert_same_checkpoint(read_checkpoint(saved, 4), read_checkpoint(tmp_path / "damaged", 4))


def test_each_bit_of_a_records_data_is_covered_and_records_without_checksum_pass(tmp_path: Path) -> None:
    tensor, path = torch.arange(64, dtype=torch.int32), tmp_path / "record"
    torch.save(tensor, path)
    data = bytearray(path.read_bytes())
    start = data.find(tensor.numpy().tobytes())
    for bit in range(0, 64 * 32, 37):
        data[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with path.open("rb") as file, pytest.raises(DamagedRecord, match=f"{path} is damaged .* at byte 7 "):
            verify_crc(file, str(path), 7)
        data[start + bit // 8] ^= 1 << bit % 8
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with path.open("rb") as file:
        assert torch.equal(torch.load(verify_crc(file, str(path), 0)), tensor)


def test_the_advice_names_whole_checkpoints_alone(tmp_path: Path) -> None:
    for iteration, whole in ((2, True), (4, True), (6, False), (8, True)):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        if whole:
            (folder / ".metadata").touch()
    (tmp_path / TRACKER).write_text("8")
    assert "--ckpt-step (2, 4)" in recovery_hint(str(tmp_path), 8)
    assert "--ckpt-step (2, 8)" in recovery_hint(str(tmp_path), 4)
    assert "no other checkpoint" in recovery_hint(str(tmp_path / "elsewhere"), None)


def advice_for(folder: Path) -> str:
    """The hint after a checkpoint of ``folder`` could not be read."""
    with pytest.raises(LionError) as raised, read_errors_named(str(folder), SimpleNamespace(ckpt_step=None)):
        raise OSError("damaged")
    return str(raised.value)


def test_folders_and_trackers_that_only_look_like_megatrons_do_not_hide_the_damage(tmp_path: Path) -> None:
    for name in ("iter_0000020", "iter_0000030.bak", "iter_0000040_old", "iter_50", "iter_0000060 ", "iter_"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    assert complete_iterations(str(tmp_path)) == [20]
    (tmp_path / TRACKER).write_text("²")  # a digit for str.isdigit, but not for int
    assert "--ckpt-step (20)" in advice_for(tmp_path)
    (tmp_path / TRACKER).write_bytes(b"\xff\xfe\0")
    assert "--ckpt-step (20)" in advice_for(tmp_path)


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model and a part of the next."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.supports(
    "a full disk while saving",
    "one line on what to do; the checkpoint before it resumes bit for bit",
)
@pytest.mark.parametrize("how", ["", pytest.param(ASYNC_SAVE, id="async", marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_its_name_and_the_previous_checkpoint_loads(
    text: Path, tmp_path: Path, small_disk: Path, undisturbed: dict[str, Any], how: str
) -> None:
    run = pretrain(text, RUN, how, f"--train-iters {LAST} --save {small_disk} --save-interval 3", ranks=2, kill_at=99)
    assert run.returncode not in (0, -9), run.output[-3000:]
    assert (small_disk / TRACKER).read_text() == "3"
    lines = [line for line in run.output.splitlines() if "megatron-lion: error:" in line]
    assert lines, run.output[-3000:]
    assert f"could not be written to {small_disk}" in lines[0]
    assert "MB free" in lines[0]
    assert "resume from iteration 3, the last complete checkpoint there" in lines[0]
    save = f"--save {tmp_path} --save-interval {LAST}"
    pretrain(text, RUN, f"--train-iters {LAST} --load {small_disk}", save, ranks=2)
    assert_same_checkpoint(undisturbed, read_checkpoint(tmp_path, LAST))
