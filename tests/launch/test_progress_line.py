"""What the screen shows of a step, from lines as Megatron 0.19.2 prints them."""

import pytest

from launch.launcher import progress_line
from tests.launch.recipe_cases import recipe

LINE = (
    " [2026-11-24 20:18:22.120767] iteration        3/     300 | consumed samples:           48 | elapsed time per "
    "iteration (ms): 250.0 | learning rate: 1.500000E-04 | global batch size:    16 | {losses}loss scale: 1.0 | "
    "grad norm: 1.694 | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
)


def test_a_step_is_one_line_with_loss_rate_norm_speed_and_the_time_that_is_left() -> None:
    found = recipe("tiny_gpt", "lion", "cpu")
    shown = progress_line.readable(LINE.format(losses="lm loss: 6.161234E+00 | "), found)
    # 16 x 128 tokens in 0.25 s; 8.46e9 operations on 2 ranks; 297 steps of 0.25 s.
    expected = "step 3/300 | lm loss 6.1612 | lr 0.00015 | norm 1.69 | 8,192 tokens/s | 0.0169 TFLOP/s | 0:01:14 left"
    assert shown == expected


def test_every_loss_is_shown_and_a_skipped_update_is_told() -> None:
    found = recipe("tiny_bert", "lion", "cpu")
    shown = progress_line.readable(LINE.format(losses="lm loss: 6.0E+00 | sop loss: 6.9E-01 | "), found)
    assert "| lm loss 6.0000 | sop loss 0.6900 | lr" in str(shown)
    assert "no loss: update skipped" in str(progress_line.readable(LINE.format(losses=""), found))


@pytest.mark.parametrize(
    "line", ["", "building GPT model ...\n", " validation loss at iteration 4 | lm loss value: 6.1E+00 |"]
)
def test_other_lines_are_left_as_they_are(line: str) -> None:
    assert progress_line.readable(line, recipe("tiny_gpt", "lion", "cpu")) is None
