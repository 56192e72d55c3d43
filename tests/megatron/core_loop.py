"""A training loop on ``megatron.core`` alone, as one is written where Megatron's own is not there: the wheel of 0.16.

    torchrun --nproc-per-node 2 tests/megatron/core_loop.py --data PREFIX --iterations 8 --save FOLDER --save-interval 4

A tiny GPT in DistributedDataParallel, the optimizer that ``get_megatron_optimizer`` gives for "lion", Megatron's
schedule, checkpoints through ``megatron.core.dist_checkpointing``. Batches follow the iteration, so that every number
of ranks reads the same ones. Logs each iteration as Megatron's loop does. With PROBE_OUTPUT each rank leaves which
optimizer has each of its parameters as ``rank<N>.json``.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import megatron_lion

LAYERS, WIDTH, SEQUENCE, VOCABULARY, MICRO_BATCH, GLOBAL_BATCH = 2, 64, 32, 512, 2, 8
LATEST = "latest_checkpointed_iteration.txt"


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--bf16-gradients", action="store_true")
    parser.add_argument("--fp8-weights", action="store_true")
    parser.add_argument("--gather", default="params")
    parser.add_argument("--reduce", default="stock")
    parser.add_argument("--telemetry-interval", type=int, default=0)
    parser.add_argument("--sharding", default="fully_reshardable")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--save-interval", type=int, default=1000)
    parser.add_argument("--save-stale", action="store_true", help="save without the last step's gather")
    parser.add_argument("--load", type=Path)
    return parser.parse_args(line)


def build(args: argparse.Namespace, *, sharded: bool = True, **options: Any) -> tuple[Any, Any]:
    """The wrapped model and its optimizer, which ``options`` of Megatron's configuration may change."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=SEQUENCE)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not args.bf16_gradients,
        fp8_param_gather=args.fp8_weights,
        use_distributed_optimizer=sharded,
        overlap_grad_reduce=args.overlap,
        overlap_param_gather=args.overlap,
        bucket_size=20_000 if args.overlap else None,
    )
    wrapped = DistributedDataParallel(config, ddp_config, Float16Module(config, model) if args.bf16 else model)
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap:
        config.no_sync_func, config.grad_sync_func = wrapped.no_sync, wrapped.start_grad_sync
        config.param_sync_func = wrapped.start_param_sync
    exchanged = {"lion_gather": args.gather, "lion_reduce": args.reduce}
    settings = {"optimizer": "lion", "lion_beta1": 0.8, "lion_beta2": 0.97} | exchanged | options
    optimizer_config = OptimizerConfig(
        lr=1e-4,
        min_lr=1e-4,
        weight_decay=0.1,
        bf16=args.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=sharded,
        **settings,
    )
    optimizer = get_megatron_optimizer(optimizer_config, [wrapped])
    constant = OptimizerParamScheduler(
        optimizer,
        init_lr=1e-4,
        max_lr=1e-4,
        min_lr=1e-4,
        lr_warmup_steps=0,
        lr_decay_steps=1,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    constant.step(1)  # it is what makes the weight decay of biases and norms 0
    return wrapped, optimizer


def micro_batches(tokens: torch.Tensor, iteration: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of the global batch of one iteration."""
    from megatron.core import parallel_state as mpu

    starts = torch.randint(
        len(tokens) - SEQUENCE - 1, (GLOBAL_BATCH,), generator=torch.Generator().manual_seed(iteration)
    )
    rows = torch.stack([tokens[start : start + SEQUENCE + 1] for start in starts.tolist()])
    for index, micro_batch in enumerate(rows.split(MICRO_BATCH)):
        if index % mpu.get_data_parallel_world_size() == mpu.get_data_parallel_rank():
            yield {"tokens": micro_batch[:, :-1].contiguous(), "labels": micro_batch[:, 1:].contiguous()}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(data_iterator)
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    losses = model(batch["tokens"], positions, mask, labels=batch["labels"])
    return losses, mean_loss


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"lm loss": loss.detach().clone()}  # the schedule divides the loss in place


def unwrapped(model: Any) -> Any:
    """The GPT itself."""
    while hasattr(model, "module"):
        model = model.module
    return model


def sharded_state(args: argparse.Namespace, model: Any, optimizer: Any, *, is_loading: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, with the layout that it has."""
    state = {"model": unwrapped(model).sharded_state_dict()}
    state["optimizer"] = optimizer.sharded_state_dict(
        state["model"], is_loading=is_loading, metadata={"distrib_optim_sharding_type": args.sharding}
    )
    return state


def save(args: argparse.Namespace, model: Any, optimizer: Any, iteration: int) -> None:
    from megatron.core import dist_checkpointing

    folder = args.save / f"iter_{iteration:07d}"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    gathers = args.overlap and not args.save_stale
    if gathers:  # as Megatron's loop does: else the gather of the last step waits for the next forward pass
        model.disable_forward_pre_hook()
    dist_checkpointing.save(sharded_state(args, model, optimizer), str(folder))
    if gathers:
        model.enable_forward_pre_hook()
    if torch.distributed.get_rank() == 0:
        (args.save / LATEST).write_text(str(iteration))


def load(args: argparse.Namespace, model: Any, optimizer: Any) -> int:
    """Restore the latest checkpoint; returns its iteration."""
    from megatron.core import dist_checkpointing

    iteration = int((args.load / LATEST).read_text())
    wanted = sharded_state(args, model, optimizer, is_loading=True)
    state = dist_checkpointing.load(wanted, str(args.load / f"iter_{iteration:07d}"))
    unwrapped(model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return iteration


def train(args: argparse.Namespace) -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    model, optimizer = build(args)
    documents = IndexedDataset(args.data)
    tokens = torch.cat([torch.from_numpy(documents[i].astype("int64")) for i in range(len(documents))])
    start = load(args, model, optimizer) if args.load and (args.load / LATEST).exists() else 0
    dp_ranks = mpu.get_data_parallel_world_size()
    num_micro_batches = GLOBAL_BATCH // MICRO_BATCH // dp_ranks
    reports = megatron_lion.Reports(model, optimizer, iteration=start, telemetry_interval=args.telemetry_interval)
    for iteration in range(start + 1, args.iterations + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches(tokens, iteration),
            model=model,
            num_microbatches=num_micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        applied, grad_norm, _ = optimizer.step()
        assert applied
        loss = torch.stack([output["lm loss"].double() for output in outputs]).mean()
        torch.distributed.all_reduce(loss)
        if torch.distributed.get_rank() == 0:
            print(
                f" iteration {iteration:8d}/{args.iterations:8d} | elapsed time per iteration (ms): 0.0 | "
                f"lm loss: {loss.item() / dp_ranks:.9E} | grad norm: {grad_norm:.6f} |",
                flush=True,
            )
        reports.after_step(iteration)
        if args.save and iteration % args.save_interval == 0:
            save(args, model, optimizer, iteration)
    if "PROBE_OUTPUT" in os.environ:
        from tests.megatron.probe import owners

        path = Path(os.environ["PROBE_OUTPUT"]) / f"rank{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps({"owners": owners([model], optimizer)}))


def main() -> None:
    megatron_lion.register()
    from megatron.core import parallel_state as mpu

    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel()
    train(arguments())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
