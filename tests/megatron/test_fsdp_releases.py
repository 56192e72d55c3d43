"""Lion under Megatron-FSDP on the older releases: losses, a resume and another number of ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import assert_same_checkpoint, read_checkpoint, relative_difference
from tests.megatron.fsdp_runs import FP32_GRADIENTS, FSDP, RUN, saving, tensors_of
from tests.versions import Megatron, started


@pytest.fixture(scope="module", params=["0.17.1", "0.18.2"])
def megatron(request: pytest.FixtureRequest) -> Iterator[Megatron]:
    yield from started(request.param)


@pytest.mark.slow
@pytest.mark.supports(
    "Megatron-FSDP on 0.17.1 and 0.18.2",
    "bf16, swiglu: losses of the distributed optimizer to 5e-5, resumed bit for bit, loaded with DP 4 bit for bit",
)
def test_an_older_release_trains_resumes_and_reshards(megatron: Megatron, text: Path, tmp_path: Path) -> None:
    run = f"{RUN} --bf16 --swiglu --train-iters"
    reference = megatron.pretrain(text, f"{run} 4 --use-distributed-optimizer", ranks=2)
    sharded = f"{FSDP} optim_grads_params {FP32_GRADIENTS} {run}"
    whole = megatron.pretrain(text, f"{sharded} 4", saving(tmp_path / "whole", 2), ranks=2)
    assert relative_difference(whole.log, reference.log) <= 5e-5
    resumed = f"--load {tmp_path / 'whole'} --ckpt-step 2 {saving(tmp_path / 'resumed', 2)}"
    megatron.pretrain(text, f"{sharded} 4", resumed, ranks=2)
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 4), read_checkpoint(tmp_path / "resumed", 4))
    step = f"--load {tmp_path / 'whole'} --ckpt-step 2 {saving(tmp_path / 'four', 5)} --override-opt_param-scheduler"
    megatron.pretrain(text, f"{sharded} 2", step, ranks=4)
    one, four = (tensors_of(read_checkpoint(tmp_path / name, 2)) for name in ("whole", "four"))
    assert_same_checkpoint(one, four)
