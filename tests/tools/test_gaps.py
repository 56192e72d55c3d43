"""Differences paired by seed, their intervals, and the share of a gap that the learning rate explains."""

import pytest

from tools.paper.reporting import gap_findings, gaps


def test_bands_of_the_gap_are_over_differences_of_the_same_seed() -> None:
    """Both losses vary by 1 from seed to seed, their difference by 0.01."""
    sgd, lion = {1: 7.0, 2: 8.0, 3: 9.0, 4: 1.0}, {1: 5.0, 2: 6.01, 3: 6.99}
    by_seed = gaps.differences(sgd, lion)
    assert list(by_seed) == [1, 2, 3]
    found = gaps.interval(list(by_seed.values()))
    assert found.mean == pytest.approx(2.0) and found.half_width == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)
    assert found.is_above_zero and not found.is_below_zero
    assert not gaps.interval([1.0, -0.2]).is_above_zero  # t has one degree of freedom: 12.7
    assert gaps.interval([0.1]).half_width is None


def test_fiellers_interval_is_where_the_differences_include_zero() -> None:
    papers, best = {1: 2.0, 2: 2.1, 3: 1.8}, {1: 0.5, 2: 0.6, 3: 0.55}
    share = gaps.share_of_rate(papers, best)
    assert share and share.by_seed == pytest.approx((0.75, 1 - 0.6 / 2.1, 1 - 0.55 / 1.8))
    assert share.low < share.value < share.high
    for end in (share.low, share.high):
        scaled = gaps.interval([best[seed] - (1.0 - end) * papers[seed] for seed in papers])
        assert scaled.half_width is not None and abs(scaled.mean) == pytest.approx(scaled.half_width)
    # Without a spread of the gap at the paper's rates it is Student's interval of the other one.
    even = gaps.share_of_rate(dict.fromkeys(best, 2.0), best)
    half = gaps.interval([value / 2.0 for value in best.values()]).half_width
    assert even and half and (even.high - even.low) / 2 == pytest.approx(half)


@pytest.mark.parametrize(
    ("papers", "best", "said"),
    [
        ([2.0], [0.5], "no share of the rate is given, because two seeds with all four runs are needed, 1 finished."),
        ([0.1, -0.1, 0.3], [0.1, 0.1, 0.1], "0.100 (+- 0.497), is not above 0."),
        ([2.0, 2.1, 1.9], [-0.5, -0.6, -0.5], "SGD's mean loss is below LION's."),
        ([2.0, 2.1, 1.9], [3.0, 3.1, 3.0], "the gap is wider at the best rates."),
        ([2.0, 2.1, 1.9], [0.1, -0.1, 0.1], "The interval includes 100 %: at the best rates there may be no gap."),
        ([2.0, 2.1, 1.9], [1.8, 2.2, 1.8], "The interval includes 0 %: perhaps nothing is due to the rate."),
        ([2.0, 2.1, 1.9], [0.5, 0.5, 0.5], "of the gap is due to the learning rate (3 seeds)."),
    ],
)
def test_a_share_is_said_in_clear_words(papers: list[float], best: list[float], said: str) -> None:
    words = gap_findings.share_in_words("validation loss", dict(enumerate(papers)), dict(enumerate(best)))
    assert words.startswith("For the validation loss ") and words.endswith(said), words
