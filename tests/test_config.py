"""Lion's options are checked in one place, and each error has the value and the alternative."""

from typing import Any

import pytest

from megatron_lion.config import LionError, LionOptions, NormRatioOptions, check_rates, warning_about
from megatron_lion.nearest import nearest_names


@pytest.mark.parametrize("kernel", ["auto", "reference", "foreach", "fused"])
def test_every_kernel_is_accepted(kernel: str) -> None:
    assert LionOptions(kernel=kernel).kernel == kernel


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kernel": "fusd"}, "--lion-kernel 'fusd' is unknown: did you mean 'fused'"),
        ({"momentum_dtype": "fp23"}, "--lion-momentum-dtype 'fp23' is unknown: did you mean 'fp32'"),
        ({"betas": (1.5, 0.9)}, r"--lion-beta1 must be in \[0, 1\), got 1.5; the usual value is 0.9"),
        ({"betas": (0.9, -0.1)}, r"--lion-beta2 must be in \[0, 1\), got -0.1"),
        ({"betas": (0.9, "0.98")}, r"--lion-beta2 must be in \[0, 1\), got '0.98'"),
        ({"betas": 0.9}, "betas must be two numbers such as .*, got 0.9"),
        ({"gather": "sings"}, "--lion-gather 'sings' is unknown: did you mean 'signs'"),
        ({"gather": "signs", "gather_refresh": -1}, "--lion-gather-refresh must be >= 0 steps"),
        ({"gather_refresh": 5}, "no effect without --lion-gather signs"),
        ({"reduce": "int5"}, "--lion-reduce 'int5' is unknown: did you mean 'int8'"),
        ({"reduce": "int4", "error_feedback": "fp8"}, "--lion-error-feedback 'fp8' is unknown"),
        ({"error_feedback": "none"}, "--lion-error-feedback none has no effect without --lion-reduce int8"),
        ({"gather": "signs", "gather_refresh": "5"}, "--lion-gather-refresh must be >= 0 steps .*, got '5'"),
        ({"fast_norm": "false"}, "--lion-fast-norm must be True or False, got 'false'"),
        ({"init_from": "adma"}, "--lion-init-from 'adma' is unknown: did you mean 'adam'"),
        ({"master_weights": "remains"}, "--lion-master-weights 'remains' is unknown: did you mean 'remainder'"),
    ],
)
def test_unknown_options_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(LionError, match=said):
        LionOptions(**asked)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((None, 0.1), "--optimizer lion needs --lr"),
        ((float("nan"), 0.1), "--lr must be a finite number >= 0, got nan"),
        ((1e-4, -1.0), "--weight-decay must be a finite number >= 0, got -1"),
        (("1e-4", 0.1), "--lr must be a finite number >= 0, got '1e-4'"),
        ((1e-4, 0.1, "1e-5"), "--min-lr must be a finite number >= 0, got '1e-5'"),
        ((1e-5, 0.1, 1e-4), "--min-lr 0.0001 is greater than --lr 1e-05"),
    ],
)
def test_rates_that_lion_cannot_train_with_are_refused(rates: tuple[Any, ...], said: str) -> None:
    with pytest.raises(LionError, match=said):
        check_rates(*rates)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"interval": -1}, r"--norm-ratio-interval must be >= 0 iterations \(0 is off\), got -1"),
        ({"interval": "10"}, "--norm-ratio-interval .*, got '10'"),
        ({"interval": 1, "batches": 0}, "--norm-ratio-batches must be >= 1 global batches, .*got 0"),
        ({"at_start": "false"}, "--norm-ratio-at-start must be True or False, got 'false'"),
    ],
)
def test_rounds_that_are_not_possible_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(LionError, match=said):
        NormRatioOptions(**asked)


# Lion's rates of docs/coming-from-adamw.md, section 4, and AdamW's there and in common use.
PUBLISHED = [
    (2e-3, 0.7), (1e-3, 0.7), (1e-3, 0.6), (5e-4, 0.7), (5e-4, 0.6), (3e-4, 0.1), (1e-4, 0.01), (1e-5, 0.01),
]  # fmt: skip
ADAMW = [(8e-3, 0.1), (4e-3, 0.2), (2e-3, 0.2), (6e-4, 0.1), (4e-3, 0.7), (1e-3, 0.0)]


@pytest.mark.parametrize("rates", PUBLISHED, ids=str)
def test_no_published_rate_of_lions_gives_a_warning(rates: tuple[float, float]) -> None:
    assert warning_about(*rates) is None


def test_a_rate_above_adamws_gives_a_warning_of_its_size() -> None:
    assert str(warning_about(1.0, 0.1)).startswith("--lr 1 is far above Lion's published rates for language models")


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("batch-size", ["global-batch-size", "micro-batch-size"]),  # all names with these words
        ("bacth-size", ["micro-batch-size", "global-batch-size"]),  # equally near, the nearer one first
        ("weight_decay", ["weight-decay"]),  # not no-weight-decay
        ("size", ["hidden-size", "vocab-size"]),  # the shortest
        ("rate", []),
        ("seq-lenght", ["seq-length"]),
        ("", []),
        ("-", []),
    ],
)
def test_all_names_that_are_near_are_suggested(value: str, nearest: list[str]) -> None:
    names = ["global-batch-size", "micro-batch-size", "hidden-size", "vocab-size", "weight-decay", "seq-length"]
    names += ["no-weight-decay"]
    assert nearest_names(value, names) == nearest


@pytest.mark.parametrize("rates", ADAMW, ids=str)
def test_rates_like_adamws_give_a_warning(rates: tuple[float, float]) -> None:
    assert str(warning_about(*rates)).startswith(
        f"--lr {rates[0]:g} with --weight-decay {rates[1]:g} looks like AdamW's"
    )
