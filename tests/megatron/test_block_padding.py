"""Buckets are padded where a shard boundary would cut a block of int8 momentum."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lion.config import LionOptions
from megatron_lion.integration.flags import state_precision
from tests.harness import BATCH, CPU, MODEL, RATE, run_ranks
from tests.rehearse.rehearsals import FLAGS, LION, rehearse
from tests.versions import since

INT8 = "--lion-momentum-dtype int8"


def command_line(dp: int, **changed: object) -> SimpleNamespace:
    """What Megatron has made of a command line."""
    made = SimpleNamespace(
        use_distributed_optimizer=True,
        ddp_pad_buckets_for_high_nccl_busbw=False,
        data_parallel_size=dp,
        context_parallel_size=1,
        num_experts=None,
    )
    vars(made).update(changed)
    return made


@pytest.mark.parametrize(("dp", "is_padded"), [(1, False), (4, False), (6, False), (8, True), (16, True), (24, True)])
def test_buckets_are_padded_only_where_a_boundary_may_cut_a_block(dp: int, is_padded: bool) -> None:
    for dtype, expected in (("int8", is_padded), ("bf16", False)):
        args = command_line(dp)
        state_precision.pad_buckets_for_blocks(args, LionOptions(momentum_dtype=dtype))
        assert args.ddp_pad_buckets_for_high_nccl_busbw is expected


def test_shards_of_experts_and_of_context_parallel_ranks_count() -> None:
    options = LionOptions(momentum_dtype="int8")
    experts = {
        "num_experts": 4,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "world_size": 16,
    }
    for args in (command_line(4, context_parallel_size=2), command_line(4, **experts)):
        state_precision.pad_buckets_for_blocks(args, options)
        assert args.ddp_pad_buckets_for_high_nccl_busbw


def test_a_run_of_16_shards_pads_its_buckets_and_says_so(tmp_path: Path) -> None:
    run = rehearse(tmp_path, FLAGS, LION, INT8, "--global-batch-size 32", rank=0, ranks=16)
    assert run.returncode == 0, run.output[-3000:]
    assert [line for line in run.ours() if "int8 momentum: buckets are padded to multiples of 65536 elements" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_on", "saved_as"),
    [
        pytest.param(4, INT8, marks=since("0.18")),  # on 0.17 the first loss of 4 and of 8 ranks differ, before a step
        (8, "--lion-momentum-dtype bf16"),
        (8, ""),
    ],
)
def test_a_checkpoint_without_the_padding_is_loaded_with_it(tmp_path: Path, saved_on: int, saved_as: str) -> None:
    folder = tmp_path / "saved"
    mock = "--tokenizer-type NullTokenizer --vocab-size 500 --mock-data --bf16 --global-batch-size 16"
    flags = (MODEL, BATCH, RATE, CPU, LION, mock, "--lr-decay-iters 20")
    save = f"--train-iters 3 --save {folder} --save-interval 2"
    saved = run_ranks(*flags, saved_as, save, ranks=saved_on)
    assert saved.returncode == 0, saved.output[-6000:]
    loaded = run_ranks(*flags, INT8, f"--train-iters 3 --load {folder} --ckpt-step 2", ranks=8)
    assert loaded.returncode == 0, loaded.output[-6000:]
    assert loaded.log.loss[3] == pytest.approx(saved.log.loss[3], rel=1e-4)  # the forward pass of the saved weights
