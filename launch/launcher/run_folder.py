"""The folder of a run: its lock, the recipe that is saved in it, and the check against the recipe before."""

import contextlib
import errno
import fcntl
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.version import __version__

from . import commands
from .recipe_files import ROOT
from .recipes import Recipe

# Keys that cannot change when a run resumes from its checkpoints.
FIXED = (
    "script", "num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size", "max-position-embeddings",
    "tokenizer-type", "optimizer", "lr", "min-lr", "train-iters", "lr-decay-iters",
)  # fmt: skip
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # from file systems, such as Lustre without -o flock


@contextlib.contextmanager
def claimed(recipe: Recipe) -> Iterator[list[int]]:
    """Make and lock the run's folder and ``save``, so that a second start does not train into them.

    Yields the locks' descriptors. A child that inherits them keeps the locks while it lives, also if this process is
    killed. Raises LionError if another start has one of them.
    """
    keys = [key for key in ("run", "save") if key in recipe.settings]
    folders = {os.path.realpath(recipe[key]): key for key in reversed(keys)}  # both may be the same one
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_locked(key, Path(recipe[key]))) for key in reversed(folders.values())]


@contextlib.contextmanager
def _locked(key: str, folder: Path) -> Iterator[int]:
    path = folder / "lock"
    with writing(key, folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(key, folder):
            _lock(handle, key, path)
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, key: str, path: Path) -> None:
    """Lock the open file and write this process into it, for the error message of another start."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 1000).decode(errors="replace").strip() or "a process that is just starting"
        raise LionError(
            f"{key} {path.parent} is in use by another start, {owner}, or by ranks that it left behind ({path}). Wait "
            f"until they have ended, end them (Ctrl-C lets them save), or use another folder as {key}=..."
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        print(
            f"warning: the file system of {path} has no locks ({error.strerror}): do not start this run twice",
            file=sys.stderr,
        )
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)


@contextlib.contextmanager
def writing(key: str, folder: Path) -> Iterator[None]:
    """Turn an OSError into a LionError that names the key of ``folder``."""
    try:
        yield
    except OSError as error:
        named = f" {error.filename}" if error.filename not in (None, str(folder), folder) else ""
        raise LionError(
            f"{key} {folder} cannot be written ({error.strerror or error}{named}): use a folder that you can write as "
            f"{key}=..., or free its disk"
        ) from error


def write(path: Path, text: str) -> None:
    """Write the file as a whole, or leave it as it was and raise OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def save_recipe(recipe: Recipe, extra: list[str]) -> Path:
    """Save the recipe in the run's folder, which is returned. A start with another recipe or commit writes a new file.

    Raises LionError if the folder has checkpoints of another run.
    """
    folder = Path(recipe["run"])
    with writing("run", folder):
        saved = _saved(folder)
        if recipe.tracker.is_file():
            _check_resumes(recipe, [json.loads(text)["settings"] for text in saved])
        content = commands.record(recipe, extra, versions())
        if not saved or saved[-1] != content:
            names = itertools.chain(["recipe.json"], (f"recipe-{number}.json" for number in itertools.count(2)))
            write(next(path for path in map(folder.joinpath, names) if not os.path.lexists(path)), content)
    return folder


def _saved(folder: Path) -> list[str]:
    """The recipes that are saved in a run's folder, oldest first. A file that is none is named and left out."""
    found = []
    for path in sorted(folder.glob("recipe*.json"), key=lambda path: path.lstat().st_mtime):
        try:
            text = path.read_text(encoding="utf-8")
            if not isinstance(json.loads(text)["settings"], dict):
                raise TypeError("settings is not a table")
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"warning: {path} is not a recipe that launch.py saved ({error}): ignored", file=sys.stderr)
        else:
            found.append(text)
    return found


def _check_resumes(recipe: Recipe, saved: list[dict[str, Any]]) -> None:
    """Raise LionError if the last of the ``saved`` settings that wrote to this recipe's checkpoints differs from it."""
    before = next((settings for settings in reversed(saved) if settings.get("save") == recipe.get("save")), {})
    place = "save" if "save" in recipe.settings else "run"
    for key in FIXED if before else ():
        if before.get(key) != recipe.get(key):
            raise LionError(
                f"{recipe[place]} has checkpoints of a run with {key}={before.get(key)}, not {recipe.get(key)}: use "
                f"another folder as {place}=..., or {key}={before.get(key)} to resume that run"
            )


def versions() -> dict[str, str | None]:
    """Versions that a run depends on. The commit ends in + if the checkout has uncommitted changes."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "megatron-lion": __version__}
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        found["commit"] = commit + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        found["commit"] = None
    return found
