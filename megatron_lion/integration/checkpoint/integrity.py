"""Checkpoint integrity: CRC checks on reading, and errors that name the file and what to do.

Megatron's ``torch_dist`` format stores each tensor as a small zip archive. torch writes a CRC-32 of the bytes into it,
but does not check it on reading. This module does, for weights, optimizer state of any kind and the common state, in
any layout, and for checkpoints saved without this package too. It costs one CRC of the bytes that a rank reads. Not
covered: other formats, and ``.metadata``, a pickle with the position of each tensor.
"""

import contextlib
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
from megatron_lion.integration.cpu import torch_cuda

CHUNK = 1 << 20
COMMON_STATE = "common.pt"
CHECKPOINT_FOLDER = re.compile("iter_[0-9]{7,}")  # as Megatron names it; "iter_0000020.bak" is the user's own
# Errors from reading a file that is missing, cut short or overwritten.
READ_ERRORS = (OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, json.JSONDecodeError)


class DamagedRecord(OSError):
    """A tensor or object in a checkpoint file differs from what was written."""


def get_filesystem_reader(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let the reader of a ``torch_dist`` checkpoint check each record that it reads."""
    return with_checks(stock(*args, **kwargs))


def with_checks(reader: Any) -> Any:
    """Let torch's ``FileSystemReader`` check each record that it reads; returns it."""
    if hasattr(reader, "_slice_file"):  # not the multi-storage client's
        slice_file = reader._slice_file
        reader._slice_file = lambda file, place: verify_crc(slice_file(file, place), file.name, place.offset)
    return reader


def save_checkpoint(
    stock: Callable[..., Any], iteration: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around a save: say if it changes the run, and name the errors."""
    from megatron.training import get_args

    from megatron_lion.integration.exchange import block_reduce  # here: it imports Megatron, and tools read without it

    settings = get_args()
    if not settings.no_save_optim:
        intervals = (getattr(settings, name, None) for name in ("save_interval", "non_persistent_save_interval"))
        block_reduce.announce_save(optimizer, iteration, intervals)
    return write_errors_named(stock, iteration, model, optimizer, *args, **kwargs)


def write_errors_named(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a save: turn an error such as a full disk into one line, on every rank, as Megatron raises it on all."""
    from megatron.training import get_args

    try:
        with exit_signal.processes_live_through_it(get_args()):
            return stock(*args, **kwargs)
    except (OSError, CheckpointException) as error:
        folder, chain = get_args().save, list(causes(error))
        cause = next((cause for cause in chain if isinstance(cause, OSError)), chain[-1])
        free = shutil.disk_usage(folder).free / 1e6 if Path(folder).is_dir() else 0.0
        latest = _tracker(folder)
        resume = f"then resume from iteration {latest}, the last complete checkpoint there" if latest else "start again"
        raise LionError(
            f"a checkpoint could not be written to {folder} ({free:.1f} MB free): {cause}. Make room or choose "
            f"another --save, {resume}"
        ) from error


def maybe_finalize_async_save(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Before each step: finish a save in the background. Without ``--async-save`` there is none."""
    from megatron.training import get_args

    return write_errors_named(stock, *args, **kwargs) if get_args().async_save else stock(*args, **kwargs)


def init_persistent_async_worker(stock: Callable[..., Any], rank: int, mp_mode: str = "spawn") -> Any:
    """Let the process that writes checkpoints in the background live through the exit signal.

    On the CPU it is forked: only then it has what answers for CUDA.
    """
    from megatron.training import get_args

    with exit_signal.processes_live_through_it(get_args()):
        return stock(rank, "fork" if torch_cuda.wanted() else mp_mode)


CORE = (
    compat.wrap(
        "megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader",
        get_filesystem_reader,
        parameters=("checkpoint_dir",),
    ),
)
TRAINING = (
    compat.wrap(
        "megatron.training.checkpointing:save_checkpoint",
        save_checkpoint,
        parameters=("iteration", "model", "optimizer"),
    ),
    compat.wrap(
        "megatron.training.async_utils:maybe_finalize_async_save",
        maybe_finalize_async_save,
        parameters=("blocking",),
    ),
    compat.wrap(
        "megatron.training.async_utils:init_persistent_async_worker",
        init_persistent_async_worker,
        parameters=("rank", "mp_mode"),
    ),
)


@contextlib.contextmanager
def read_errors_named(load_dir: str, args: Any) -> Iterator[None]:
    """Turn an error in reading the checkpoint in ``load_dir`` into a LionError with the file and what to do."""
    try:
        yield
    except SystemExit as error:  # with status 0, which for torchrun is the end of training (363, 1743)
        if error.code or args.exit_on_missing_checkpoint:
            raise
        hint = recovery_hint(load_dir, _asked_for(load_dir, args))
        raise LionError(f"{_unreadable_folder(load_dir)}. {hint}") from error
    except (Exception, CheckpointException) as error:
        if problem := read_problem(error, _folder(load_dir, args)):
            raise LionError(problem) from error
        raise


def read_problem(error: BaseException, folder: Path) -> str | None:
    """The message for an error in reading the checkpoint in ``folder``, or None for another kind of error."""
    cause = next(filter(_is_read_error, causes(error)), None)
    if cause is None:
        return None
    is_named = CHECKPOINT_FOLDER.fullmatch(folder.name)
    load_dir, failed = (str(folder.parent), int(folder.name[5:])) if is_named else (str(folder), None)
    return f"the checkpoint in {folder} cannot be read: {cause}. {recovery_hint(load_dir, failed)}"


def _is_read_error(error: BaseException) -> bool:
    # torch raises an AssertionError if it could not unpickle the metadata (state_dict_loader 265).
    return isinstance(error, READ_ERRORS) or "metadata read failed" in str(error.args[:1])


def verify_crc(record: BinaryIO, path: str, offset: int) -> io.BytesIO:
    """Return the bytes of ``record`` after checking the CRC-32 of each of its entries.

    Raises DamagedRecord with the file. An entry without a checksum (``torch.serialization.set_crc32_options(False)``)
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
        raise DamagedRecord(f"{path} is damaged or cut short at byte {offset} or after it ({error})") from error
    data.seek(0)
    return data


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and its causes, also those that torch collected from its ranks."""
    yield error
    for _, (failure, _) in sorted((getattr(error, "failures", None) or {}).items()):
        yield from causes(failure)
    if error.__cause__ is not None:
        yield from causes(error.__cause__)


def _folder(load_dir: str, args: Any) -> Path:
    """The folder of the requested checkpoint, or ``load_dir`` if its iteration is not known."""
    iteration = _asked_for(load_dir, args)
    return Path(load_dir) if iteration is None else Path(load_dir) / f"iter_{iteration:07d}"


def check_common_state(load_dir: str | None, args: Any) -> None:
    """Raise DamagedRecord for a damaged common state, if it is a separate file, as before 0.19."""
    path = _folder(load_dir, args) / COMMON_STATE if load_dir else None
    if path and path.is_file():
        with path.open("rb") as file:
            verify_crc(file, str(path), 0)


def recovery_hint(load_dir: str, failed: int | None) -> str:
    """The complete checkpoints in ``load_dir`` other than that of iteration ``failed``, and how to load one."""
    whole = [iteration for iteration in complete_iterations(load_dir) if iteration != failed]
    if not whole:
        return f"There is no other checkpoint in {load_dir} to go back to. Nothing was changed"
    others = ", ".join(str(iteration) for iteration in whole)
    return f"Restore the file, or go back to another checkpoint there with --ckpt-step ({others}). Nothing was changed"


def complete_iterations(load_dir: str) -> list[int]:
    """The iterations of the complete ``torch_dist`` checkpoints in ``load_dir``, in order."""
    names = (found.parent.name for found in Path(load_dir).glob("iter_*/.metadata"))
    return sorted(int(name[5:]) for name in names if CHECKPOINT_FOLDER.fullmatch(name))


def _asked_for(load_dir: str, args: Any) -> int | None:
    """The iteration in ``--ckpt-step``, or else in the tracker file; None if neither has one."""
    text = _tracker(load_dir)
    return args.ckpt_step or (int(text) if text.isdecimal() else None)


def _tracker(load_dir: str) -> str:
    file = Path(load_dir) / "latest_checkpointed_iteration.txt"
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""


def _unreadable_folder(load_dir: str) -> str:
    """The error for a folder that Megatron does not read."""
    text = _tracker(load_dir)
    if text.isdecimal() or text == "release":
        return f"the checkpoint in {load_dir} cannot be read"
    return f"{load_dir}/latest_checkpointed_iteration.txt contains {text!r}, expected an iteration number"
