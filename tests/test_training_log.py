"""The log reader on what Megatron 0.19.2 really printed: a run, one killed and resumed, one that skipped iterations."""

from pathlib import Path

import pytest

from megatron_lion.config import LionError
from megatron_lion.training_log import TrainingLog, read_training_log

# A tiny GPT, killed in iteration 6 and resumed from iteration 3; then its evaluations.
KILLED = """\
  fault_injector_delay_start_iteration ............ None
Overwriting rerun_state_machine.current_iteration from -1 to 0...
 [2026-11-23 20:22:33.166862] iteration        3/       6 | consumed samples:           24 | elapsed time per iteration (ms): 22.6 | learning rate: 5.500000E-05 | global batch size:     8 | lm loss: 6.229397E+00 | loss scale: 1.0 | grad norm: 1.553 | number of skipped iterations:   0 | number of nan iterations:   0 |
[Rank 0] (after 3 iterations) memory (MB) | allocated: 0.00 | max allocated: 0.00 | reserved: 0.00 | max reserved: 0.00
 validation loss at iteration 3 | lm loss value: 6.211395E+00 | lm loss PPL: 4.983959E+02 |\x20
 [2026-11-23 20:22:35.855941] iteration        4/       6 | consumed samples:           32 | elapsed time per iteration (ms): 24.7 | learning rate: 3.250000E-05 | global batch size:     8 | lm loss: 6.215522E+00 | loss scale: 1.0 | grad norm: 1.436 | number of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-11-23 20:22:35.877199] iteration        5/       6 | consumed samples:           40 | elapsed time per iteration (ms): 21.1 | learning rate: 1.602886E-05 | global batch size:     8 | lm loss: 6.226936E+00 | loss scale: 1.0 | grad norm: 1.518 | number of skipped iterations:   0 | number of nan iterations:   0 |
"""  # noqa: E501
RESUMED = """\
megatron-lion: lion on 28 of 28 parameters (134.9k), betas (0.9, 0.95), weight decay 0.1, state on every rank
 [2026-11-23 20:22:41.106765] iteration        4/       6 | consumed samples:           32 | elapsed time per iteration (ms): 30.5 | learning rate: 3.250000E-05 | global batch size:     8 | lm loss: 6.215522E+00 | loss scale: 1.0 | grad norm: 1.436 | number of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-11-23 20:22:41.130947] iteration        5/       6 | consumed samples:           40 | elapsed time per iteration (ms): 27.3 | learning rate: 1.602886E-05 | global batch size:     8 | lm loss: 6.221229E+00 | loss scale: 1.0 | grad norm: 1.518 | number of skipped iterations:   0 | number of nan iterations:   0 |
 [2026-11-23 20:22:41.158794] iteration        6/       6 | consumed samples:           48 | elapsed time per iteration (ms): 27.8 | learning rate: 1.000000E-05 | global batch size:     8 | lm loss: 6.203537E+00 | loss scale: 1.0 | grad norm: 1.521 | number of skipped iterations:   0 | number of nan iterations:   0 |
 validation loss at iteration 6 | lm loss value: 6.218390E+00 | lm loss PPL: 5.018943E+02 |\x20
 validation loss at iteration 6 on validation set | lm loss value: 6.210256E+00 | lm loss PPL: 4.978287E+02 |\x20
 validation loss at iteration 6 on test set | lm loss value: 6.218191E+00 | lm loss PPL: 5.017945E+02 |\x20
"""  # noqa: E501
# With fp16 and too large a loss scale: Megatron prints no loss for an iteration that it skipped.
SKIPPED = " [2026-11-23 20:37:23.247073] iteration        1/       4 | consumed samples:            8 | elapsed time per iteration (ms): 61.2 | learning rate: 1.000000E-04 | global batch size:     8 | loss scale: 536870912.0 | number of skipped iterations:   1 | number of nan iterations:   0 |\n"  # noqa: E501


def record(text: str, folder: Path) -> TrainingLog:
    path = folder / "log.txt"
    path.write_text(text)
    return read_training_log(path)


def test_every_iteration_is_read_with_its_loss_and_time(tmp_path: Path) -> None:
    log = record(KILLED, tmp_path)
    assert log.iterations == 6
    assert log.loss == {3: 6.229397, 4: 6.215522, 5: 6.226936}
    assert log.milliseconds == {3: 22.6, 4: 24.7, 5: 21.1}


def test_gradient_norms_are_those_before_clipping(tmp_path: Path) -> None:
    assert record(KILLED, tmp_path).grad_norm == {3: 1.553, 4: 1.436, 5: 1.518}


def test_berts_sum_of_losses_is_read_by_its_name(tmp_path: Path) -> None:
    text = KILLED.replace("E+00 | loss scale", "E+00 | sop loss: 7.1E-01 | loss: 6.9E+00 | loss scale")
    text = text.replace(
        "lm loss PPL: 4.983959E+02 |", "lm loss PPL: 4.98E+02 | sop loss value: 7.2E-01 | loss value: 6.8 |"
    )
    path = tmp_path / "log.txt"
    path.write_text(text)
    log = read_training_log(path, "loss")
    assert (log.loss, log.validation) == ({3: 6.9, 4: 6.9, 5: 6.9}, {3: 6.8})


def test_an_evaluation_in_the_middle_is_not_taken_for_a_final_one(tmp_path: Path) -> None:
    killed = record(KILLED, tmp_path)
    assert (killed.validation, killed.final) == ({3: 6.211395}, {})
    whole = record(KILLED + RESUMED, tmp_path)
    assert whole.validation == {3: 6.211395, 6: 6.21839}
    assert whole.final == {"validation": 6.210256, "test": 6.218191}


def test_a_resumed_run_holds_the_later_values_of_the_iterations_run_twice(tmp_path: Path) -> None:
    log = record(KILLED + RESUMED, tmp_path)
    assert log.loss == {3: 6.229397, 4: 6.215522, 5: 6.221229, 6: 6.203537}
    assert log.milliseconds == {3: 22.6, 4: 30.5, 5: 27.3, 6: 27.8}


def test_a_line_answers_with_its_iteration_so_that_a_run_can_be_followed() -> None:
    log = TrainingLog()
    assert [log.add_line(line) for line in KILLED.splitlines()] == [None, None, 3, None, None, 4, 5]


def test_a_skipped_iteration_has_no_loss(tmp_path: Path) -> None:
    assert record(SKIPPED + RESUMED, tmp_path).loss.keys() == {4, 5, 6}


def test_a_line_cut_off_by_a_kill_is_no_iteration(tmp_path: Path) -> None:
    cut = RESUMED.splitlines()[2][:150]
    assert record(f"{KILLED}{cut}", tmp_path).loss[5] == 6.226936


def test_bytes_that_are_not_text_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"\xff\xfe progress bar \r\n" + KILLED.encode())
    assert max(read_training_log(path).loss) == 5


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(LionError, match=r"absent\.txt does not exist: pass the file"):
        read_training_log(tmp_path / "absent.txt")


@pytest.mark.parametrize("text", ["", "Traceback (most recent call last):\n", " validation loss at iteration 3 | no\n"])
def test_a_log_without_iterations_says_what_may_be_wrong(tmp_path: Path, text: str) -> None:
    with pytest.raises(LionError, match=r"log\.txt reports no loss: did the run start"):
        record(text, tmp_path)
