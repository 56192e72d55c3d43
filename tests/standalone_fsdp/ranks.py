"""Plain Lion in the package ``megatron-fsdp``, on every rank.

    torchrun --nproc-per-node 2 tests/standalone_fsdp/ranks.py steps           # each way to shard, also unsharded
    torchrun --nproc-per-node 2 tests/standalone_fsdp/ranks.py save FOLDER     # two steps, a checkpoint, one more step
    torchrun --nproc-per-node 1 tests/standalone_fsdp/ranks.py resume FOLDER   # the checkpoint, and that step

Rank 0 prints the outcome of each case as ``CASE name: outcome``.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from tests.standalone_fsdp import on_cpu

on_cpu.install()
from megatron_fsdp import fully_shard_model, fully_shard_optimizer  # noqa: E402
from torch.distributed.checkpoint.state_dict_loader import load  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import save  # noqa: E402

from megatron_lion import Lion  # noqa: E402

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
KERNELS = ("reference", "foreach", "fused")
RATE = 1e-2
# Strategy, dtype of the model, Lion's options with and without sharding.
Case = tuple[str, torch.dtype, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    **{
        f"{strategy}, {kernel}": (strategy, torch.float32, {"kernel": kernel}, {"kernel": kernel})
        for strategy in STRATEGIES
        for kernel in KERNELS
    },
    # The package keeps fp32 masters of a bf16 model: they are the parameters that Lion gets.
    "bf16 model": (STRATEGIES[-1], torch.bfloat16, {}, {"momentum_dtype": "fp32", "master_weights": "fp32"}),
    "bf16 momentum": (STRATEGIES[-1], torch.float32, {"momentum_dtype": "bf16"}, {"momentum_dtype": "bf16"}),
}
SAVED = STRATEGIES[-1], torch.float32, {"momentum_dtype": "bf16"}


def build(strategy: str | None, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Lion]:
    """A model with 7 x 9, 9, 9 x 2 and 2 parameters: no two ranks have as many of them."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)).to(dtype)
    if strategy is not None:
        model = fully_shard_model(model, fsdp_unit_modules=[torch.nn.Linear], zero_dp_strategy=strategy)
    optimizer = Lion(model.parameters(), lr=0.0, weight_decay=0.1, **options)
    if strategy is not None:
        fully_shard_optimizer(optimizer)  # makes a step with zero gradients
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return model, optimizer


def step(model: Any, optimizer: Lion, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Backward pass and step. Every rank has the same batch: the mean over 1 and 2 ranks is exact."""
    batch = torch.randn(8, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model(batch).float().pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor: Any) -> torch.Tensor:
    """Of a DTensor, the parts of all ranks, which may differ in size."""
    if not hasattr(tensor, "placements"):
        return tensor.detach().clone()
    here = tensor.to_local().detach().clone()
    if tensor.placements[0].is_replicate():
        return here
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, here.flatten())
    return torch.cat(parts).view(tensor.shape)


def weights(model: Any) -> list[torch.Tensor]:
    """The parameters that the forward pass uses, by the optimizer's names."""
    if hasattr(model, "_replace_param_with_distributed_if_needed"):
        model._replace_param_with_distributed_if_needed()
    return [whole(param) for param in model.parameters()]


def compare_with_unsharded(case: str) -> str:
    strategy, dtype, sharded, unsharded = CASES[case]
    runs = []
    for run in ((None, dtype, unsharded), (strategy, dtype, sharded)):
        model, optimizer = build(*run)
        for seed in range(3):
            step(model, optimizer, seed, dtype)
        runs.append([tensor.to(dtype) for tensor in weights(model)])
    same = all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    return "same bits" if same else "other bits"


def saved(folder: Path) -> None:
    model, optimizer = build(*SAVED)
    for seed in range(2):
        step(model, optimizer, seed)
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    step(model, optimizer, 2)
    after = weights(model)
    if torch.distributed.get_rank() == 0:
        torch.save(after, folder / "expected.pt")


def resumed(folder: Path) -> str:
    model, optimizer = build(*SAVED)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    step(model, optimizer, 2)
    expected = torch.load(folder / "expected.pt")
    return "same bits" if all(map(torch.equal, weights(model), expected)) else "other bits"


def main() -> None:
    torch.distributed.init_process_group("gloo")
    what = sys.argv[1]
    outcomes = {}
    if what == "steps":
        outcomes = {case: compare_with_unsharded(case) for case in CASES}
    elif what == "save":
        saved(Path(sys.argv[2]))
    else:
        outcomes = {"next step": resumed(Path(sys.argv[2]))}
    if torch.distributed.get_rank() == 0:
        for case, outcome in outcomes.items():
            print(f"CASE {case}: {outcome}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
