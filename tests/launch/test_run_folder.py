"""The folder of a run: the recipe that is saved in it, files that cannot be written or read, and the lock."""

import errno
import fcntl
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.launcher import main, recipes, run_folder
from megatron_lion.config import LionError
from tests.launch.recipe_cases import recipe


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a recipe with overrides in the run's folder."""
    (tmp_path / "run").mkdir()

    def prepare(*overrides: str) -> Path:
        return run_folder.save_recipe(recipe("tiny_gpt", "lion", "cpu", f"run={tmp_path}/run", *overrides), ["--x"])

    return prepare


def test_the_resolved_recipe_is_saved_with_versions_and_each_other_start_beside_it(saved: Callable[..., Path]) -> None:
    folder = saved()
    content = json.loads((folder / "recipe.json").read_text())
    assert content["names"] == {"model": "tiny_gpt", "optimizer": "lion", "cluster": "cpu"}
    assert content["settings"]["lr"] == 1e-3
    assert content["extra"] == ["--x"]
    assert content["command"].endswith("--x")
    assert content["versions"]["megatron-core"]
    assert re.fullmatch(r"[0-9a-f]{40}\+?", content["versions"]["commit"])
    saved()
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]
    saved("log-interval=5")
    assert sorted(path.name for path in folder.iterdir()) == ["recipe-2.json", "recipe.json"]


def test_another_run_does_not_go_on_from_these_checkpoints(saved: Callable[..., Path]) -> None:
    (saved() / "checkpoints").mkdir()
    (saved() / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("100")
    saved("log-interval=5")
    for override, words in (
        ("hidden-size=64", "hidden-size=128, not 64: use another folder as run=..., or hidden-size=128"),
        ("lr=2e-3", "lr=0.001, not 0.002"),
    ):
        with pytest.raises(LionError, match=re.escape(words)):
            saved(override)


def test_another_run_does_not_resume_from_checkpoints_in_another_folder(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    place = f"save={tmp_path}/saved"
    saved(place)
    saved("lr=3e-3")  # a run with its own checkpoints
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("100")
    saved(place)
    saved("lr=2e-3")  # checkpoints elsewhere are not in its way
    with pytest.raises(
        LionError, match=r"/saved has checkpoints of a run with lr=0.001, not 0.002: use .* save=..., or"
    ):
        saved(place, "lr=2e-3")


def test_a_recipe_never_replaces_one_that_is_saved(saved: Callable[..., Path]) -> None:
    folder = saved()
    saved("log-interval=5")
    saved("log-interval=6")
    (folder / "recipe-2.json").unlink()
    kept = (folder / "recipe-3.json").read_text()
    saved("log-interval=7")
    saved("log-interval=8")
    assert (folder / "recipe-3.json").read_text() == kept
    assert sorted(path.name for path in folder.iterdir()) == [
        "recipe-2.json", "recipe-3.json", "recipe-4.json", "recipe.json",
    ]  # fmt: skip


# ---- files that cannot be written or read ----


def test_a_recipe_that_cannot_be_written_is_one_error_and_leaves_no_part_of_it(saved: Callable[..., Path]) -> None:
    """As on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(LionError, match=r"^run .*/run cannot be written \(File too large\): use .* as run=..., or"):
            saved()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in saved().iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [("/proc/x", "No such file or directory"), ("file/x", "Not a directory"), ("file", "File exists")],
)
def test_a_folder_that_cannot_be_made_is_named_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    found = recipe("tiny_gpt", "lion", "cpu", f"run={run}")
    message = rf"^run {re.escape(str(tmp_path / run))} cannot be written \({reason}\): use a folder .* as run=\.\.\."
    with pytest.raises(LionError, match=message):
        main.run_here(found, [])
    with pytest.raises(LionError, match=message):
        main.submit(found, [], "python3")


def test_a_log_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(LionError, match=r"cannot be written \(Is a directory .*/log.txt\)"):
        main.run_here(recipe("tiny_gpt", "lion", "cpu", f"run={tmp_path}"), [])


def test_saved_recipes_that_cannot_be_read_are_named_and_ignored(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved()
    contents = {2: b"", 3: b"{", 4: b"[]", 5: b'{"settings": 1}', 6: b"\xff", 7: b'"settings"', 8: b"{}"}
    for number, content in contents.items():
        (folder / f"recipe-{number}.json").write_bytes(content)
    (folder / "recipe-9.json").mkdir()
    (folder / "recipe-10.json").symlink_to("nowhere")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("100")
    saved()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 9
    assert {line.split()[1] for line in warnings} == {f"{folder}/recipe-{number}.json" for number in range(2, 11)}
    assert all(" is not a recipe that launch.py saved (" in line for line in warnings)
    with pytest.raises(LionError, match=r"with lr=0.001, not 0.002"):
        saved("lr=2e-3")
    saved("log-interval=5")
    assert json.loads((folder / "recipe-11.json").read_text())["settings"]["log-interval"] == 5


# ---- the lock ----


def test_a_second_start_is_refused_with_the_host_and_the_process_of_the_first(tmp_path: Path) -> None:
    found = recipe("tiny_gpt", "lion", "cpu", f"run={tmp_path}/run")
    owner = f"process {os.getpid()} on {os.uname().nodename}"
    message = rf"^run {tmp_path}/run is in use by another start, {owner}, .* \(.*/run/lock\)\. Wait until .* as run="
    with run_folder.claimed(found):
        before = sorted((tmp_path / "run").iterdir())
        for start in (lambda: main.run_here(found, []), lambda: main.submit(found, [], "python3")):
            with pytest.raises(LionError, match=message):
                start()
        assert sorted((tmp_path / "run").iterdir()) == before
    with run_folder.claimed(found):
        pass


def test_checkpoints_in_another_folder_are_locked_too(tmp_path: Path) -> None:
    def other(run: str, save: str) -> recipes.Recipe:
        return recipe("tiny_gpt", "lion", "cpu", f"run={tmp_path}/{run}", f"save={tmp_path}/{save}")

    with run_folder.claimed(other("first", "saved")):
        with run_folder.claimed(other("second", "own")):
            pass
        with (
            pytest.raises(LionError, match=r"^save .*/saved is in use .* as save="),
            run_folder.claimed(other("second", "saved")),
        ):
            pass
    with run_folder.claimed(other("first", "first")) as locks:
        assert len(locks) == 1


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = recipe("tiny_gpt", "lion", "cpu", f"run={tmp_path}/run")
    reasons = [errno.ENOSYS, errno.EIO]

    def refuse(*_: object) -> None:
        raise OSError(reasons[0], os.strerror(reasons[0]))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_folder.claimed(found):
        pass
    expected = f"warning: the file system of {tmp_path}/run/lock has no locks (Function not implemented): do not start"
    assert capsys.readouterr().err.startswith(expected)
    reasons.pop(0)
    with pytest.raises(LionError, match=r"cannot be written \(Input/output error\)"), run_folder.claimed(found):
        pass
