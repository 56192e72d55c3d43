"""Damaged checkpoints: a flipped bit is noticed, and each failure to read or write names the file and what to do.

Megatron's ``torch_dist`` format stores each tensor as a small zip archive in which torch writes a CRC-32 of the bytes,
and torch reads it back without looking at it. Here it is looked at, for weights, optimizer state of any kind and the
common state alike, whatever the layout that saved them or loads them, and with checkpoints saved without this package.
It costs one CRC of what a rank reads. Not covered: ``.metadata``, a pickle, which says where each tensor lies, and
other formats.
"""

import functools
import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.checkpoint.api import CheckpointException

from megatron_lion.config import LionError
from megatron_lion.integration import compat, exit_signal

CHUNK = 1 << 20
COMMON_STATE = "common.pt"
CHECKPOINT_FOLDER = re.compile("iter_[0-9]{7,}")  # as Megatron names it; "iter_0000020.bak" is the user's own
# What reading a file that is missing, cut short or overwritten ends in.
READ_ERRORS = (OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, json.JSONDecodeError)


class DamagedRecord(OSError):
    """A tensor or object in a checkpoint file is not what was written."""


def install() -> None:
    """Check what Megatron reads from a ``torch_dist`` checkpoint, and say what to do where reading or writing fails."""
    import megatron.core.dist_checkpointing.strategies.torch as strategies
    import megatron.training.async_utils as async_utils
    import megatron.training.checkpointing as checkpointing

    stock_reader = strategies._get_filesystem_reader
    stock_load = checkpointing._load_base_checkpoint

    @functools.wraps(stock_reader)
    def _get_filesystem_reader(*args: Any, **kwargs: Any) -> Any:
        return with_checks(stock_reader(*args, **kwargs))

    @functools.wraps(stock_load)
    def _load_base_checkpoint(load_dir: str, args: Any, *rest: Any, **kwargs: Any) -> Any:
        try:
            _check_common_state(load_dir, args)
            return stock_load(load_dir, args, *rest, **kwargs)
        except SystemExit as error:  # with status 0, which torchrun takes for the end of training (363, 1743)
            if error.code or args.exit_on_missing_checkpoint:
                raise
            raise LionError(f"{_unreadable_folder(load_dir)}. {advice(load_dir, args)}") from error
        except (Exception, CheckpointException) as error:
            cause = next(filter(_is_read_error, causes(error)), None)
            if cause is None:
                raise
            problem = f"the checkpoint in {_folder(load_dir, args)} cannot be read: {cause}"
            raise LionError(f"{problem}. {advice(load_dir, args)}") from error

    compat.replace_everywhere(strategies, "_get_filesystem_reader", _get_filesystem_reader)
    compat.replace_everywhere(checkpointing, "_load_base_checkpoint", _load_base_checkpoint)
    for module, name in ((checkpointing, "save_checkpoint"), (async_utils, "maybe_finalize_async_save")):
        compat.replace_everywhere(module, name, _naming_write_errors(getattr(module, name)))


def with_checks(reader: Any) -> Any:
    """Let torch's ``FileSystemReader`` check what it reads; returns it."""
    if hasattr(reader, "_slice_file"):  # not the multi-storage client's
        slice_file = reader._slice_file
        reader._slice_file = lambda file, place: checked(slice_file(file, place), file.name, place.offset)
    return reader


def _naming_write_errors(save: Callable[..., Any]) -> Callable[..., Any]:
    """``save`` with one line for a full disk or the like, on every rank: Megatron tells all of them."""

    @functools.wraps(save)
    def save_or_say(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        try:
            with exit_signal.processes_live_through_it(get_args()):
                return save(*args, **kwargs)
        except (OSError, CheckpointException) as error:
            folder, chain = get_args().save, list(causes(error))
            cause = next((cause for cause in chain if isinstance(cause, OSError)), chain[-1])
            free = shutil.disk_usage(folder).free / 1e6 if Path(folder).is_dir() else 0.0
            latest = _tracker(folder)
            resume = (
                f"then resume from iteration {latest}, the last whole checkpoint there" if latest else "start again"
            )
            raise LionError(
                f"a checkpoint could not be written to {folder} ({free:.1f} MB free): {cause}. Make room or choose "
                f"another --save, {resume}"
            ) from error

    return save_or_say


def _is_read_error(error: BaseException) -> bool:
    # torch asserts where it could not unpickle the metadata (state_dict_loader 265).
    return isinstance(error, READ_ERRORS) or "metadata read failed" in str(error.args[:1])


def checked(record: BinaryIO, path: str, offset: int) -> io.BytesIO:
    """The bytes of ``record``, of which each entry has the CRC-32 that was written with it.

    Raises DamagedRecord naming the file. An entry without a checksum (``torch.serialization.set_crc32_options(False)``)
    passes.
    """
    data = io.BytesIO(record.read())
    try:
        with zipfile.ZipFile(data) as archive:
            for entry in archive.infolist():
                if entry.CRC:
                    with archive.open(entry) as content:
                        while content.read(CHUNK):
                            pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise DamagedRecord(f"{path} is damaged or cut short at byte {offset} or behind it ({error})") from error
    data.seek(0)
    return data


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what led to it, also where torch collected the errors of its ranks."""
    yield error
    for _, (failure, _) in sorted((getattr(error, "failures", None) or {}).items()):
        yield from causes(failure)
    if error.__cause__ is not None:
        yield from causes(error.__cause__)


def _folder(load_dir: str, args: Any) -> Path:
    """Where the checkpoint lies that is asked for; the folder of all where that is not known."""
    iteration = _asked_for(load_dir, args)
    return Path(load_dir) if iteration is None else Path(load_dir) / f"iter_{iteration:07d}"


def _check_common_state(load_dir: str | None, args: Any) -> None:
    """Raise DamagedRecord for a common state that is a file of its own, as before 0.19, and not what was written."""
    path = _folder(load_dir, args) / COMMON_STATE if load_dir else None
    if path and path.is_file():
        with path.open("rb") as file:
            checked(file, str(path), 0)


def advice(load_dir: str, args: Any) -> str:
    """Which checkpoints in ``load_dir`` look whole, beside the one that was asked for, and how to load one."""
    failed = _asked_for(load_dir, args)
    whole = [iteration for iteration in complete_iterations(load_dir) if iteration != failed]
    if not whole:
        return f"There is no other checkpoint in {load_dir} to go back to. Nothing was changed"
    others = ", ".join(str(iteration) for iteration in whole)
    return f"Restore the file, or go back to another checkpoint there with --ckpt-step ({others}). Nothing was changed"


def complete_iterations(load_dir: str) -> list[int]:
    """The iterations whose ``torch_dist`` checkpoints in ``load_dir`` were written to their end, in order."""
    names = (found.parent.name for found in Path(load_dir).glob("iter_*/.metadata"))
    return sorted(int(name[5:]) for name in names if CHECKPOINT_FOLDER.fullmatch(name))


def _asked_for(load_dir: str, args: Any) -> int | None:
    """The iteration that ``--ckpt-step``, or else the tracker file, names; None where neither does."""
    text = _tracker(load_dir)
    return args.ckpt_step or (int(text) if text.isdecimal() else None)


def _tracker(load_dir: str) -> str:
    file = Path(load_dir) / "latest_checkpointed_iteration.txt"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _unreadable_folder(load_dir: str) -> str:
    """What to say of a folder from which Megatron turned away."""
    text = _tracker(load_dir)
    if text.isdecimal() or text == "release":
        return f"the checkpoint in {load_dir} cannot be read"
    return f"{load_dir}/latest_checkpointed_iteration.txt holds {text!r} where a number should stand"
