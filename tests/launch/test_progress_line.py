"""What the screen shows of a step, from lines as Megatron 0.19.2 prints them."""

import random

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


def test_numbers_are_read_as_megatron_prints_them_and_other_fields_are_left_out() -> None:
    found = recipe("tiny_gpt", "lion", "cpu")
    losses = "lm loss: INF | sop loss: -1.5E-01 | moe loss: fine | mtp loss: 1.2.3 | aux loss: nan | z loss: e | "
    shown = str(progress_line.readable(LINE.format(losses=losses), found))
    assert shown.startswith("step 3/300 | lm loss inf | sop loss -0.1500 | aux loss nan | lr 0.00015 | norm 1.69 |")


@pytest.mark.parametrize("time", ["0", "0.0", "nan", "inf", "1e300", "1e-323", "-", "e", "fine", ""])
def test_a_step_without_a_time_that_a_step_can_have_is_left_as_it_is(time: str) -> None:
    line = LINE.format(losses="").replace("250.0", time)
    assert progress_line.readable(line, recipe("tiny_gpt", "lion", "cpu")) is None


def test_no_line_is_an_error() -> None:
    """Any words between bars, also where the line is a step."""
    found = recipe("tiny_gpt", "lion", "cpu")
    parts = ["iteration 3/ 4", "iteration 3/ " + "9" * 5000, "elapsed time per iteration (ms): 5", "loss: -", "x: fine"]
    parts += ["lm loss: e", "grad norm: +-", "learning rate: 1e", "lm loss: 1e999", "iteration", ": : :", ""]
    draw = random.Random(0)
    for _ in range(2000):
        shown = progress_line.readable(f" {' | '.join(draw.choices(parts, k=6))} |", found)
        assert shown is None or shown.startswith("step 3/")


@pytest.mark.parametrize(
    "line", ["", "building GPT model ...\n", " validation loss at iteration 4 | lm loss value: 6.1E+00 |"]
)
def test_other_lines_are_left_as_they_are(line: str) -> None:
    assert progress_line.readable(line, recipe("tiny_gpt", "lion", "cpu")) is None
