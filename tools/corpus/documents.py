"""Documents for a small corpus: Python's own documentation or plain text files, sampled and split."""

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_lion.config import LionError

from .splits import SPLITS, digest_number, split_of

SHARES = (18, 1, 1)  # of train, valid and test
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
SHORTEST_DOCSTRING = 40  # characters; shorter ones ("Return self.") say the same thing in a thousand places
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def docstrings(source: bytes) -> list[str]:
    """Return the docstrings in a Python source file; none if this Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's string literals
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=True) for node in ast.walk(tree) if isinstance(node, documented))
    # A docstring may spell a lone surrogate, which UTF-8 cannot hold.
    return [text.encode("utf-8", "replace").decode("utf-8") for text in found if text]


def python_documents(folder: Path) -> list[str]:
    """Return Python's help topics and the docstrings of the sources under `folder`, which are parsed, not imported.

    Raises LionError where one of them is absent, as in a Python that ships only compiled files.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LionError(f"this Python has no help topics ({error}): pass text with --text FILE") from error
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    names = [name for name in names if not SKIPPED_FOLDERS.intersection(name.parts)]
    found = [text for name in names for text in docstrings((folder / name).read_bytes())]
    if not found:
        raise LionError(f"no Python sources under {folder}: pass text with --text FILE")
    cleaned_topics = [inspect.cleandoc(topics[name]) for name in sorted(topics)]
    return cleaned_topics + [text for text in found if len(text) >= SHORTEST_DOCSTRING]


def read_text(path: Path) -> str:
    """Return the file's text. Raises LionError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LionError(f"--text {path}: {error}; pass a readable UTF-8 text file") from error


def paragraphs(text: str) -> list[str]:
    """Return the parts of `text` between blank lines, with their indentation."""
    return [part.strip("\n") for part in re.split(r"\n[^\S\n]*(?=\n)", text) if part.strip()]


def read_documents(text: Sequence[Path]) -> list[str]:
    """Return the paragraphs of the files in order, or Python's documentation if there is no file."""
    if not text:
        return python_documents(STANDARD_LIBRARY)
    return [part for path in text for part in paragraphs(read_text(path))]


def at_most(documents: list[str], megabytes: float) -> list[str]:
    """Return a sample of at most so many megabytes, in the given order; hashes spread it over all of the text."""
    kept, budget = set(), megabytes * 1e6
    for document in sorted(documents, key=lambda document: digest_number(document, 0)):
        size = len(document.encode("utf-8"))
        if size <= budget:
            kept.add(document)
            budget -= size
    return [document for document in documents if document in kept]


def split_documents(documents: Sequence[str]) -> dict[str, list[str]]:
    """Return about 90, 5 and 5 % as train, valid and test. Only the hash of a text decides."""
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for document in documents:
        splits[split_of(document, SHARES)].append(document)
    return splits


def select_documents(documents: list[str], max_megabytes: float | None) -> dict[str, list[str]]:
    """Return the documents of each split without duplicates. Raises LionError if a split would have none."""
    documents = list(dict.fromkeys(documents))
    limit, remedy = "", "use a hundred documents or more (a blank line ends a document)"
    if max_megabytes is not None:
        documents = at_most(documents, max_megabytes)
        limit, remedy = f" within --max-megabytes {max_megabytes:g}", "use a larger --max-megabytes, or more text"
    splits = split_documents(documents)
    if empty := [name for name in SPLITS if not splits[name]]:
        found = f"only {len(documents)} distinct documents{limit}"
        raise LionError(f"{found}, which leaves none for {' and '.join(empty)}: {remedy}")
    return splits
