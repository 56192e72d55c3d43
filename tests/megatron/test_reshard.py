"""What one layout saves another loads: masters and momentum bit for bit, and the next losses."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.megatron import reshard
from tests.megatron.reshard import LAYOUTS, STORAGES, Saved

# fp32 sums over ranks are rounded in another order, and each rounding may flip the sign of an element of c near zero.
SAME_FUNCTION = 1e-6

# Each layout saves once and loads once, each format is there; dp_reshardable and torch cannot change TP or PP.
PAIRS = [
    ("DP 1", "TP 2, sequence parallel", "fully_reshardable", "int8 momentum, remainders"),
    ("TP 2, sequence parallel", "PP 2", "fully_reshardable, memory-efficient", "fp32"),
    pytest.param("PP 2", "PP 2", "dp_reshardable", "fp32", marks=pytest.mark.slow),
    pytest.param("PP 2", "PP 2 x DP 2", "dp_reshardable", "fp32", marks=pytest.mark.slow),
    ("DP 4", "DP 2", "dp_reshardable", "bf16 momentum"),
    pytest.param("DP 2", "DP 2", "torch", "fp32", marks=pytest.mark.slow),
    ("DP 2", "DP 1", "torch", "fp32"),
    pytest.param("DP 2", "DP 2", "dp_reshardable, async", "bf16 weights", marks=pytest.mark.slow),
    pytest.param("TP 2 x DP 2", "TP 2", "torch", "fp32", marks=pytest.mark.slow),
    pytest.param("TP 2 x DP 2", "TP 2", "torch", "int8 momentum, remainders", marks=pytest.mark.slow),
]


SUPPORTED = pytest.mark.supports(
    "checkpoints in another layout: DP, TP, PP, sequence parallel; every format and storage",
    "masters and momentum bit for bit, reassembled without checkpoint code; the next ten losses",
)


@pytest.fixture(scope="module")
def saved(text: Path, tmp_path_factory: pytest.TempPathFactory):
    """Saves each layout in each format when it is first asked for, once."""
    kept: dict[tuple[str, ...], Saved] = {}

    def saved(*what: str) -> Saved:
        if what not in kept:
            kept[what] = reshard.save(text, tmp_path_factory.mktemp("saved"), *what)
        return kept[what]

    return saved


@SUPPORTED
@pytest.mark.parametrize(("one", "other", "how", "storage"), PAIRS)
@pytest.mark.supports("Megatron's loop / reshard", "on gloo ranks")
def test_a_checkpoint_loads_in_another_layout(
    text: Path, tmp_path: Path, saved: Callable[..., Saved], one: str, other: str, how: str, storage: str
) -> None:
    cell = reshard.load(text, saved(one, storage, how), tmp_path, other, storage, reshard.same_format(how))
    judge(cell, one == other, storage)


def judge(cell: reshard.Cell, is_same_layout: bool, storage: str) -> None:
    """The state is what was saved; so are the next losses, to the bit or, in fp32, but for the order of sums."""
    assert cell.different == []
    if is_same_layout:
        assert cell.loss_difference == 0.0
    elif storage == "fp32":
        assert cell.loss_difference <= SAME_FUNCTION


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_every_layout_loads_what_every_layout_saves(
    text: Path, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints the table of docs/results/resharding.md: rows save, columns load.

    In bf16 another layout rounds otherwise: the losses say nothing there, and these runs end early.
    """
    rows = [f"{storage} | {' | '.join(LAYOUTS)}", "|".join(["---"] * (len(LAYOUTS) + 1))]
    for number, one in enumerate(LAYOUTS):
        kept = reshard.save(text, tmp_path / str(number), one, storage, "fully_reshardable")
        row = [one]
        for other in LAYOUTS:
            has_losses = storage == "fp32" or one == other
            end = () if has_losses else (reshard.LOAD_ALONE,)
            cell = reshard.load(text, kept, tmp_path / f"{number}-{len(row)}", other, storage, *end)
            state = "equal" if not cell.different else "DIFFERS"
            row.append(f"{state}, {cell.loss_difference:.1e}" if has_losses else state)
            judge(cell, one == other, storage)
        rows.append(" | ".join(row))
    with capsys.disabled():
        print("\n" + "\n".join(f"| {row} |" for row in rows))


@pytest.mark.parametrize(
    ("saved_as", "other", "size", "is_requantized"),
    [
        ("int8 momentum", "TP 2", "--hidden-size 48", True),  # rows of 48, cut at 24
        pytest.param("int8 momentum", "TP 2", "--hidden-size 64", False, marks=pytest.mark.slow),
        pytest.param("bf16 weights", "DP 2", "--hidden-size 64", True, marks=pytest.mark.slow),
    ],
)
def test_int8_momentum_of_other_blocks_is_loaded_exactly_and_it_is_said(
    text: Path, tmp_path: Path, saved_as: str, other: str, size: str, is_requantized: bool
) -> None:
    # --hidden-size comes twice on these command lines; argparse takes the later one.
    flags = (size, "--ddp-pad-buckets-for-high-nccl-busbw")
    kept = reshard.save(text, tmp_path / "saved", "DP 1", saved_as, "fully_reshardable", *flags, reshard.SAVE_ALONE)
    cell = reshard.load(text, kept, tmp_path / "loaded", other, "int8 momentum", *flags, "--exit-interval 4")
    assert cell.different == []
    said = [line for line in cell.run.ours() if "were not saved in these blocks of 32" in line]
    assert len(said) == is_requantized, cell.run.ours()


@pytest.mark.refuses("another TP or PP in a format that cannot follow")
@pytest.mark.parametrize(
    ("one", "how", "other", "says"),
    [
        ("PP 2", "dp_reshardable", "TP 2", "TP 1 to 2, PP 2 to 1"),
        ("DP 2", "torch", "TP 2", "it has mp_rank_00, and this run reads mp_rank_00, mp_rank_01"),
    ],
)
def test_a_format_that_cannot_change_tp_or_pp_says_what_to_save_with(
    text: Path, tmp_path: Path, saved: Callable[..., Saved], one: str, how: str, other: str, says: str
) -> None:
    where = f"--load {saved(one, 'fp32', how).folder} {reshard.same_format(how)}"
    run = reshard.probe(text, "load", tmp_path, other, "fp32", where)
    assert run.returncode != 0
    assert says in run.output
    assert "--dist-ckpt-optim-fully-reshardable: what it saves then loads in any layout" in run.output
    assert not run.log.loss
