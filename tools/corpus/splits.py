"""The split of a document, which depends only on its text."""

import hashlib
from collections.abc import Sequence

from megatron_lion.config import LionError

SPLITS = ("train", "valid", "test")


def digest_number(document: str, part: int) -> int:
    """Return a number that depends only on the text. Part 0 and part 1 are independent of each other."""
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return int.from_bytes(digest[8 * part : 8 * part + 8], "big")


def split_of(document: str, weights: Sequence[int]) -> str:
    """Return "train", "valid" or "test", in proportion to ``weights`` in that order.

    Other documents do not matter, so identical documents are always in the same split.
    """
    _, valid, test = weights
    bucket = digest_number(document, 1) % sum(weights)
    return "valid" if bucket < valid else "test" if bucket < valid + test else "train"


def parse_split(text: str) -> tuple[int, int, int]:
    """Read ``--split``: three whole numbers such as 98,1,1. Raises LionError for anything else."""
    try:
        train, valid, test = (int(part) for part in text.split(","))
    except ValueError:
        raise LionError(f"--split {text} is not three whole numbers: use one like 98,1,1 (train,valid,test)") from None
    if min(train, valid, test) < 0 or train == 0:
        raise LionError(f"--split {text} needs a positive share for train and none below zero: use one like 98,1,1")
    return train, valid, test
