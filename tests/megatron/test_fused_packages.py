"""Lion where Transformer Engine or Apex is installed: Megatron takes other branches, also with local layers.

Both are stand-ins: Transformer Engine's Python over a stand-in for its extension, and the names of Apex that Megatron
imports. Their functions for lists of tensors compute in torch. Nothing here shows that a GPU's kernels work.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lion.integration.compat.versions import megatron_version
from tests import transformer_engine, versions
from tests.harness import (
    CPU_ENVIRONMENT,
    HORIZON,
    ROOT,
    assert_same_checkpoint,
    pretrain,
    pretrain_flags,
    read_checkpoint,
    relative_difference,
)

pytestmark = pytest.mark.slow
STAND_INS = ROOT / "tests" / "stand_ins"
UNFOLDED = Path(__file__).with_name("unfolded.py")
LION = f"--optimizer lion --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --bf16 {HORIZON}"
OFFLOAD = "--optimizer-cpu-offload --optimizer-offload-fraction 0.5"
SMALL = "--lion-momentum-dtype bf16 --lion-master-weights remainder"


@pytest.fixture(scope="module", params=["Transformer Engine", "Apex"])
def megatron(request: pytest.FixtureRequest) -> Iterator[versions.Megatron]:
    """The environment's Megatron, with the package."""
    if request.param == "Apex":
        made = versions.Megatron(megatron_version(), folders=[STAND_INS])
    else:
        wheel = transformer_engine.folder()
        environment = {transformer_engine.VARIABLE: str(wheel)}
        made = versions.Megatron(megatron_version(), folders=[wheel], environment=environment)
    yield made
    made.close()


@pytest.mark.supports(
    "Transformer Engine or Apex installed (stand-ins)",
    "norm and clip, storages, resume, CPU offload, `--lion-init-from adam`",
)
def test_norm_and_clip_are_those_of_the_package(megatron: versions.Megatron, text: Path, tmp_path: Path) -> None:
    """The factor, which is a tensor with Transformer Engine, is folded into the step to the same bits."""
    for what, taken in (("folded", "clip 4, copy 4"), ("unfolded", "clip 0, copy 0")):
        flags = f"--clip-grad 0.3 --log-params-norm --train-iters 4 --save {tmp_path}/{what} --save-interval 4"
        run = megatron.run(what, *pretrain_flags(text), LION, flags, ranks=2, script=UNFOLDED)
        assert run.returncode == 0, run.output[-6000:]
        assert f"taken over: {taken}" in run.output
        assert "norm by tests.stand_ins.extensions" in run.output
        assert "params norm" in run.output
    assert_same_checkpoint(read_checkpoint(tmp_path / "folded", 4), read_checkpoint(tmp_path / "unfolded", 4))


@pytest.mark.parametrize("storage", ["", SMALL, pytest.param(OFFLOAD, marks=versions.since("0.19"))])
def test_a_resumed_run_equals_an_uninterrupted_one(
    megatron: versions.Megatron, text: Path, tmp_path: Path, storage: str
) -> None:
    flags = f"{LION} {storage} --clip-grad 0.3 --train-iters 4"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    megatron.pretrain(text, flags, f"--save {whole} --save-interval 4", ranks=2)
    saving = f"--save {halves} --save-interval 2"
    megatron.pretrain(text, flags, saving, "--exit-interval 2", ranks=2)
    resumed = megatron.pretrain(text, flags, saving, f"--load {halves}", ranks=2)
    assert min(resumed.log.loss) == 3
    assert_same_checkpoint(read_checkpoint(whole, 4), read_checkpoint(halves, 4))


def test_a_checkpoint_is_loaded_without_the_package_too(
    megatron: versions.Megatron, text: Path, tmp_path: Path
) -> None:
    saving = f"--clip-grad 0.3 --train-iters 6 --save {tmp_path}"
    first = megatron.pretrain(text, LION, saving, "--save-interval 2", ranks=2)
    without = pretrain(text, LION, saving, f"--save-interval 9 --load {tmp_path} --ckpt-step 2", ranks=2)
    assert relative_difference(without.log, first.log) < 1e-5  # the norms are rounded differently


def test_lion_continues_from_their_adam(megatron: versions.Megatron, text: Path, tmp_path: Path) -> None:
    adam = LION.replace("lion", "adam")
    saving = f"--train-iters 4 --save {tmp_path} --save-interval 2"
    first = megatron.pretrain(text, adam, saving, ranks=2)
    continuing = f"--load {tmp_path} --ckpt-step 2 --lion-init-from adam --override-opt_param-scheduler --train-iters 4"
    lion = megatron.pretrain(text, LION, continuing, ranks=2)
    assert "continuing an Adam run" in lion.output
    assert lion.log.loss[3] == first.log.loss[3]  # before Lion's first update


def test_doctor_names_the_package(megatron: versions.Megatron) -> None:
    install = f"""
import os
from pathlib import Path
from tests import transformer_engine
if wheel := os.environ.get("{transformer_engine.VARIABLE}"):
    transformer_engine.install(Path(wheel))
from megatron_lion import cli
cli.main(["doctor"])
"""
    environment = {**megatron.environment, **CPU_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", install], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )
    package = "Transformer Engine" if transformer_engine.VARIABLE in megatron.environment else "Apex"
    assert f"Megatron's gradient norm and clip use {package}'s kernels" in done.stdout, done.stdout + done.stderr
    assert "READY" in done.stdout and "NOT READY" not in done.stdout, done.stdout[-2000:]
