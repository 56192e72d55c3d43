"""What may be asked of Lion is checked in one place, and each refusal names the value and the way out."""

import pytest

from megatron_lion.config import LionConfig, LionError

BASE = {"lr": 1e-4, "weight_decay": 0.1}


@pytest.mark.parametrize("kernel", ["auto", "reference", "foreach", "fused"])
def test_every_kernel_may_be_asked_for(kernel: str) -> None:
    assert LionConfig(**BASE, kernel=kernel).kernel == kernel


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kernel": "fusd"}, "--lion-kernel 'fusd' is unknown: did you mean 'fused'"),
        ({"momentum_dtype": "fp23"}, "--lion-momentum-dtype 'fp23' is unknown: did you mean 'fp32'"),
        ({"master_weights": "remains"}, "--lion-master-weights 'remains' is unknown: did you mean 'remainder'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(asked: dict[str, str], said: str) -> None:
    with pytest.raises(LionError, match=said):
        LionConfig(**BASE, **asked)
