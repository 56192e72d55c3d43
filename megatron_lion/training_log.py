"""Read the log of Megatron's own loop, so that a run can be watched, drawn and compared from its log."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lion.config import LionError

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|.*?elapsed time per iteration \(ms\): ([\d.]+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+) \|")
_FINAL = re.compile(r"validation loss at iteration (\d+) on (validation|test) set \|")
_GRAD_NORM = re.compile(r"\| grad norm: (\S+)")
LM_LOSS = "lm loss"


@dataclass
class TrainingLog:
    """One run's record. Iterations that were run again after a resume have the later run's values.

    ``loss``, ``grad_norm`` (before clipping) and ``milliseconds`` are keyed by iteration, ``validation`` by the
    iteration that it was evaluated at, and ``final`` by ``"validation"`` and ``"test"``. Losses are means over tokens,
    in nats.
    """

    loss_name: str = LM_LOSS
    """the loss to read, as the log names it: BERT logs ``lm loss``, ``sop loss`` and their sum ``loss``"""
    iterations: int = 0
    loss: dict[int, float] = field(default_factory=dict)
    grad_norm: dict[int, float] = field(default_factory=dict)
    milliseconds: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)

    def add_line(self, line: str) -> int | None:
        """Read one line of the log. Returns the iteration that it reports, or None for any other line."""
        if match := _ITERATION.search(line):
            if (loss := self._number(line, ": ")) is None:
                return None
            iteration, self.iterations = int(match[1]), int(match[2])
            self.milliseconds[iteration] = float(match[3])
            self.loss[iteration] = loss
            if norm := _GRAD_NORM.search(line):
                self.grad_norm[iteration] = float(norm[1])
            return iteration
        if (loss := self._number(line, " value: ")) is None:
            return None
        if match := _FINAL.search(line):
            self.final[match[2]] = loss
        elif match := _VALIDATION.search(line):
            self.validation[int(match[1])] = loss
        return None

    def _number(self, line: str, separator: str) -> float | None:
        found = re.search(rf"\| {re.escape(self.loss_name)}{separator}(\S+)", line)
        return float(found[1]) if found else None


def read_training_log(path: Path, loss_name: str = LM_LOSS) -> TrainingLog:
    """The record of the run with its output in ``path``, with the loss that the log calls ``loss_name``.

    Raises LionError where the file is missing or reports no iteration.
    """
    if not path.is_file():
        raise LionError(f"{path} does not exist: pass the file that the training run's output was written to")
    log = TrainingLog(loss_name=loss_name)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        log.add_line(line)
    if not log.loss:
        raise LionError(
            f"{path} reports no loss: did the run start? (In fp16 the first iterations are skipped and report none.)"
        )
    return log
