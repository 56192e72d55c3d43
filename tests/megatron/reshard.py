"""Layouts and storages of a checkpoint, runs that save and load them, and what a cell of their table must show."""

from dataclasses import dataclass
from pathlib import Path

from tests.harness import ASYNC_SAVE, BATCH, CPU, HORIZON, MODEL, NO_DROPOUT, RATE, Run, run_ranks, text_flags
from tests.megatron import optimizer_state

PROBE = Path(__file__).with_name("probe_state.py")
SAVED_AT = 2
LOSSES = 10
# The second loss that a resumed run logs is the mean of its first two: one more iteration than losses to compare.
END = SAVED_AT + LOSSES + 1
# One vocabulary for all: it is padded to a multiple of this number x TP.
RUN = (
    f"--optimizer lion --use-distributed-optimizer --micro-batch-size 1 --train-iters {END} {HORIZON} {NO_DROPOUT} "
    "--make-vocab-size-divisible-by 256"
)

# For tests of the state alone.
SAVE_ALONE, LOAD_ALONE = f"--exit-interval {SAVED_AT}", f"--exit-interval {SAVED_AT + 1}"

TP_2, PP_2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
SP = "--sequence-parallel"
LAYOUTS = {
    "DP 1": (1, ""),
    "DP 2": (2, ""),
    "DP 4": (4, ""),
    "TP 2": (2, TP_2),
    "TP 2, sequence parallel": (2, f"{TP_2} {SP}"),
    "PP 2": (2, PP_2),
    "TP 2 x DP 2": (4, f"{TP_2} {SP}"),
    "PP 2 x DP 2": (4, PP_2),
    "TP 2 x PP 2": (4, f"{TP_2} {SP} {PP_2}"),
}
FORMATS = {
    "fully_reshardable": "--dist-ckpt-optim-fully-reshardable",
    "fully_reshardable, memory-efficient": (
        "--dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient"
    ),
    "dp_reshardable": "",
    "dp_reshardable, async": ASYNC_SAVE,
    "torch": "--ckpt-format torch",
}
STORAGES = {
    "fp32": "",
    "bf16 weights": "--bf16",
    "bf16 momentum": "--bf16 --lion-momentum-dtype bf16",
    "int8 momentum": "--bf16 --lion-momentum-dtype int8",
    "remainders": "--bf16 --lion-master-weights remainder",
    "int8 momentum, remainders": "--bf16 --lion-momentum-dtype int8 --lion-master-weights remainder",
}


@dataclass(frozen=True)
class Saved:
    """A run that wrote a checkpoint and went on."""

    folder: Path
    state: optimizer_state.State
    run: Run


@dataclass(frozen=True)
class Cell:
    """What loading showed."""

    different: list[str]
    """the tensors that are not what was saved, bit for bit"""
    saved: Saved
    run: Run

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of the ten losses after the checkpoint."""
        compared = [iteration for iteration in range(SAVED_AT + 1, END + 1) if iteration != SAVED_AT + 2]
        assert len(compared) == LOSSES
        one, other = self.saved.run.log.loss, self.run.log.loss
        return max(abs(one[i] - other[i]) / one[i] for i in compared)


def save(
    text: Path, folder: Path, layout: str, storage: str, how: str, *flags: str, what: str = "save", at: int = SAVED_AT
) -> Saved:
    """Train, save after ``at`` iterations in format ``how``, go on to END."""
    run = probe(text, what, folder, layout, storage, FORMATS[how], *flags, at=at)
    assert run.returncode == 0, run.output[-6000:]
    return Saved(folder, optimizer_state.read(folder / "state"), run)


def load(text: Path, saved: Saved, output: Path, layout: str, storage: str, *flags: str) -> Cell:
    """Resume from ``saved`` in ``layout``, keeping nothing but the state at the start, in ``output``."""
    run = probe(text, "load", output, layout, storage, f"--load {saved.folder} --no-load-rng", *flags)
    assert run.returncode == 0, run.output[-6000:]
    return Cell(optimizer_state.differences(saved.state, optimizer_state.read(output / "state")), saved, run)


def probe(text: Path, what: str, folder: Path, layout: str, storage: str, *flags: str, at: int = SAVED_AT) -> Run:
    """A run of the probe, which may fail."""
    ranks, parallel = LAYOUTS[layout]
    where = f"--save {folder} --save-interval {SAVED_AT}" if what != "load" else ""
    output = {"PROBE_OUTPUT": str(folder / "state"), "PROBE_SAVE_AT": str(at)}
    lines = (what, MODEL, BATCH, RATE, CPU, text_flags(text), RUN, parallel, STORAGES[storage], where, *flags)
    return run_ranks(*lines, ranks=ranks, script=PROBE, environment=output)


def same_format(how: str) -> str:
    """The flag that loading needs too: the format of a ``torch_dist`` checkpoint is found in it."""
    return FORMATS[how] if how == "torch" else ""
