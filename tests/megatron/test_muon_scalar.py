"""The scalar part of Muon stays stock Megatron's after registration, and the log says so."""

from pathlib import Path

import pytest

from tests.harness import pretrain
from tests.versions import since

LINE = (
    "megatron-lion: --muon-scalar-optimizer lion: what --optimizer muon does not update is on stock Megatron's Lion, "
    "betas (0.95, 0.98); this package's Lion is --optimizer lion"
)


@pytest.mark.slow
@since("0.19")
@pytest.mark.supports("`--optimizer muon --muon-scalar-optimizer lion`", "trains as in stock Megatron; the log says so")
def test_the_log_says_that_lion_in_muon_is_stocks(text: Path) -> None:
    pytest.importorskip("emerging_optimizers", reason="Megatron's Muon")
    for scalar, lines in (("lion", [LINE]), ("adam", [])):
        run = pretrain(text, f"--optimizer muon --muon-scalar-optimizer {scalar} --train-iters 2")
        assert sorted(run.log.loss) == [1, 2]
        assert [line for line in run.ours() if "muon" in line] == lines
