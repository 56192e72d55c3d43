"""Lion's options are checked in one place, and each error has the value and the alternative."""

from typing import Any

import pytest

from megatron_lion.config import LionError, LionOptions, check_rates


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
        ({"gather": "sings"}, "--lion-gather 'sings' is unknown: did you mean 'signs'"),
        ({"gather": "signs", "gather_refresh": -1}, "--lion-gather-refresh must be >= 0 steps"),
        ({"gather_refresh": 5}, "no effect without --lion-gather signs"),
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
        ((1e-5, 0.1, 1e-4), "--min-lr 0.0001 is greater than --lr 1e-05"),
    ],
)
def test_rates_that_lion_cannot_train_with_are_refused(rates: tuple[Any, ...], said: str) -> None:
    with pytest.raises(LionError, match=said):
        check_rates(*rates)
