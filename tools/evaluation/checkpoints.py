"""Read the metadata and tensors of Megatron's ``torch_dist`` checkpoints without building a model."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError

ITERATION_FOLDER = re.compile(r"iter_(\d+)")


def find_steps(folder: Path, steps: str) -> list[int]:
    """Return the iterations to look at: ``steps`` is "all", "latest", or numbers such as 10000,20000.

    Raises LionError where the folder has no checkpoint, or not the ones asked for. A checkpoint that was not completely
    written has no metadata.json, which Megatron writes last, and does not count.
    """
    found = sorted(
        int(match[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := ITERATION_FOLDER.fullmatch(path.name)) and (path / "metadata.json").is_file()
    )
    if not found:
        raise LionError(f"--checkpoints {folder} has no complete torch_dist checkpoint (a folder iter_<N> for each)")
    if steps in ("all", "latest"):
        return found if steps == "all" else found[-1:]
    try:
        wanted = [int(part) for part in steps.split(",")]
    except ValueError:
        raise LionError(f"--steps {steps} is neither all, latest, nor numbers such as 10000,20000") from None
    if missing := sorted(set(wanted) - set(found)):
        raise LionError(f"--steps {missing[0]} is not in {folder}, which has {', '.join(map(str, found))}")
    return wanted


def iteration_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of one iteration is."""
    return folder / f"iter_{step:07d}"


def fingerprint(checkpoint: Path) -> str:
    """A fingerprint of a checkpoint: a hash of each file's name, size and time of change."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            found = path.stat()
            digest.update(f"{path.relative_to(checkpoint)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_args(checkpoint: Path) -> Any:
    """Return the command line of the run that wrote the checkpoint, as Megatron saved it. Reads no weights."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    with _readable(checkpoint):
        common = load_common_state_dict(str(checkpoint))
    if "args" not in common:
        raise LionError(f"{checkpoint} has no arguments, so its model is unknown")
    return common["args"]


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Raise LionError with the cause if a checkpoint cannot be read. Damage can raise almost any error."""
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_lion.integration.checkpoint.integrity import READ_ERRORS, causes

    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = next((each for each in causes(error) if isinstance(each, READ_ERRORS)), error)
        raise LionError(f"{checkpoint} cannot be read: {cause}. Use another step, or copy it again") from error


def tensor_sizes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the size of every tensor in the checkpoint, optimizer state included, by its key."""
    return {key: tuple(entry.size) for key, entry in _metadata(checkpoint).items() if hasattr(entry, "size")}


def _metadata(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says of each of its tensors, by key. Raises LionError where that cannot be read."""
    from torch.distributed.checkpoint import FileSystemReader

    with _readable(checkpoint / ".metadata"):
        return dict(FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata)


def require_gpt(checkpoint: Path) -> None:
    """Raise LionError if the checkpoint is not of a GPT."""
    sizes = tensor_sizes(checkpoint)
    if "embedding.word_embeddings.weight" not in sizes or "decoder.final_layernorm.weight" not in sizes:
        what = "BERT" if "encoder.final_layernorm.weight" in sizes else "another architecture"
        raise LionError(f"{checkpoint} has {what}, not a GPT: this tool needs a GPT's checkpoint")


def read_tensors(checkpoint: Path, keys: list[str]) -> dict[str, Any]:
    """Return whole tensors of a checkpoint by key, from any layout. Needs no ranks.

    Raises LionError naming a key that is not there, and a file that is missing or damaged.
    """
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    from megatron_lion.integration.checkpoint.integrity import with_checks

    metadata = _metadata(checkpoint)
    if missing := [key for key in keys if key not in metadata]:
        raise LionError(f"{checkpoint} has no {missing[0]}: is it a GPT of Megatron-Core?")
    state = {key: torch.empty(metadata[key].size, dtype=metadata[key].properties.dtype) for key in keys}
    with _readable(checkpoint):
        load(state, storage_reader=with_checks(FileSystemReader(str(checkpoint))), no_dist=True)
    return state
