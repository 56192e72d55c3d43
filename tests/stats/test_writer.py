"""The file of rounds: each once, in order, none lost to a kill."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_lion.config import LionError
from megatron_lion.stats.writer import RecordFile, read_records


def write(path: Path, *iterations: int) -> RecordFile:
    """A file with a round at each of ``iterations``."""
    file = RecordFile(path)
    assert file.resume(0) is None
    for iteration in iterations:
        file.append(json.dumps({"iteration": iteration, "ratio": 1.5}))
    return file


def iterations(path: Path) -> list[int]:
    return [record["iteration"] for record in read_records(path)]


def test_rounds_come_back_in_order_and_the_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x" / "norm_ratio.jsonl"
    file = write(path, 10, 20)
    assert iterations(path) == [10, 20]
    assert not file.is_empty()
    assert RecordFile(tmp_path / "new.jsonl").resume(0) is None
    assert RecordFile(tmp_path / "new.jsonl").is_empty()


def test_what_a_resumed_run_measures_again_moves_aside_and_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "norm_ratio.jsonl"
    moved = write(path, 10, 20, 30).resume(15)
    assert moved == f"2 lines of {path} lie after iteration 15: moved to {path}.superseded"
    assert iterations(path) == [10]
    assert iterations(Path(f"{path}.superseded")) == [20, 30]
    assert RecordFile(path).resume(15) is None


def test_a_line_that_was_cut_off_moves_aside_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "norm_ratio.jsonl"
    write(path, 10, 20)
    with path.open("a") as file:
        file.write('{"iteration": 30, "rat')
    assert iterations(path) == [10, 20]
    assert "1 lines" in str(RecordFile(path).resume(20))
    assert Path(f"{path}.superseded").read_text() == '{"iteration": 30, "rat\n'
    RecordFile(path).append('{"iteration": 30}')
    assert iterations(path) == [10, 20, 30]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_last_line_without_its_newline_is_kept_and_finished(tmp_path: Path, resumed: bool) -> None:
    """A kill between a round and its newline, or an editor."""
    path = tmp_path / "norm_ratio.jsonl"
    write(path, 10, 20)
    path.write_text(path.read_text().removesuffix("\n"))
    file = RecordFile(path)
    if resumed:
        assert file.resume(20) is None
    file.append('{"iteration": 30}')
    file.append('{"iteration": 40}')
    assert iterations(path) == [10, 20, 30, 40]
    assert path.read_text().count("\n") == 4
    assert not Path(f"{path}.superseded").exists()


def test_files_that_are_not_of_rounds_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "norm_ratio.jsonl"
    with pytest.raises(LionError, match="does not exist"):
        read_records(path)
    path.write_text("")
    with pytest.raises(LionError, match="holds no round"):
        read_records(path)
    path.write_text("iteration 1 | lm loss: 2.0\niteration 2 | lm loss: 1.9\n")
    with pytest.raises(LionError, match=r"is no norm_ratio\.jsonl: it has the line 'iteration 1"):
        read_records(path)


def test_a_file_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(LionError, match=r"--norm-ratio-file .* cannot be written"):
        RecordFile(tmp_path / "taken" / "norm_ratio.jsonl").resume(0)


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Let the operating system refuse to write beyond ``size`` bytes of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_round_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A part of a line would stay in the middle of the file for good."""
    path = tmp_path / "norm_ratio.jsonl"
    file = write(path, 10)
    before = path.read_bytes()
    for iteration in (20, 30):
        with no_room_beyond(len(before) + 5), pytest.raises(OSError, match="File too large"):
            file.append(json.dumps({"iteration": iteration, "ratio": 1.5}))
        assert path.read_bytes() == before
    file.append(json.dumps({"iteration": 40}))
    assert iterations(path) == [10, 40]
