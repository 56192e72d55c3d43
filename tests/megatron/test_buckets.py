"""Checkpoints of buffers with several buckets, whose padding stock Megatron 0.19.2 gets wrong; ours keep every element.

Each case is tried as stock gathers the state, too: a test that would pass without our repair says nothing about it.
"""

from pathlib import Path

import pytest

from tests.megatron import reshard
from tests.megatron.reshard import LOAD_ALONE, SAVE_ALONE
from tests.versions import until

BUCKETS = "--overlap-grad-reduce --ddp-bucket-size"
# Tied embeddings on two stages begin a bucket of their own; the one before it then ends within its last 64 elements.
ODD_SIZES = "--pipeline-model-parallel-size 2 --hidden-size 36 --max-position-embeddings 34"

SUPPORTED = pytest.mark.supports(
    "checkpoints of several buckets", "state bit for bit in another layout, where stock's is corrupt or not saved"
)


@SUPPORTED
@until("0.19")  # 0.20 keeps them itself
def test_fully_reshardable_state_of_several_buckets_is_corrupted_by_stock_and_kept_by_ours(
    text: Path, tmp_path: Path
) -> None:
    # Megatron issue 5077: every parameter behind the first bucket is saved from the wrong place.
    sizes = "--hidden-size 36"
    loaded = {}
    for what in ("stock-save", "save"):
        how = ("DP 2", "fp32", "fully_reshardable", sizes, f"{BUCKETS} 20000", SAVE_ALONE)
        saved = reshard.save(text, tmp_path / what, *how, what=what)
        loaded[what] = reshard.load(text, saved, tmp_path / f"{what}-load", "TP 2", "fp32", sizes, LOAD_ALONE)
    assert loaded["save"].different == []
    assert len(loaded["stock-save"].different) > 10


@SUPPORTED
@pytest.mark.parametrize(
    ("layout", "other", "flags", "stock_says"),
    [
        pytest.param(
            "DP 4",
            "DP 1",
            f"{BUCKETS} 64",
            "empty bucket encountered",
            marks=pytest.mark.slow,  # 6191
        ),
        ("PP 2", "PP 2 x DP 2", ODD_SIZES, "out of bounds chunk"),  # 5898
    ],
)
def test_dp_reshardable_pieces_of_padding_are_refused_by_stock_and_saved_by_ours(
    text: Path, tmp_path: Path, layout: str, other: str, flags: str, stock_says: str
) -> None:
    stock = reshard.probe(text, "stock-save", tmp_path / "stock", layout, "fp32", flags, SAVE_ALONE)
    assert stock.returncode != 0
    assert stock_says in stock.output
    saved = reshard.save(text, tmp_path / "ours", layout, "fp32", "dp_reshardable", flags, SAVE_ALONE)
    assert reshard.load(text, saved, tmp_path / "load", other, "fp32", flags, LOAD_ALONE).different == []
