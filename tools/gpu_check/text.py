"""This repository's own text as a data set of bytes for Megatron: it needs no tokenizer and no network."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megatron_lion", "launch", "tools", "tests", "docs", "configs")
SUFFIXES = (".py", ".md", ".sh", ".cpp", ".h", ".yaml")


def write(prefix: Path) -> None:
    """Write PREFIX.bin and PREFIX.idx, a document for each file, every token a byte."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(paths):
        text = path.read_bytes()
        builder.add_document(torch.tensor(list(text), dtype=torch.int32), [len(text)])
    builder.finalize(f"{prefix}.idx")
