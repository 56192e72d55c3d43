"""Plain Lion on the parameters of torch FSDP2, on every rank.

    torchrun --nproc-per-node 2 tests/dtensor_ranks.py steps           # each kernel and precision, also unsharded
    torchrun --nproc-per-node 2 tests/dtensor_ranks.py save FOLDER     # two steps, a checkpoint, one more step
    torchrun --nproc-per-node 3 tests/dtensor_ranks.py resume FOLDER   # the checkpoint, and that step

Rank 0 prints the outcome of each case as ``CASE name: outcome``.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from megatron_lion import Lion, LionError

BF16 = {"dtype": torch.bfloat16}
# Kernel, precision of the parameters, options of Lion.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{kernel: (kernel, {}, {}) for kernel in ("auto", "reference", "foreach", "fused")},
    **{
        f"{kernel} {name}": (kernel, BF16, options)
        for kernel in ("reference", "fused")
        for name, options in {
            "bf16": {},
            "bf16 momentum fp32": {"momentum_dtype": "fp32"},
            "bf16 masters fp32": {"momentum_dtype": "fp32", "master_weights": "fp32"},
            "bf16 remainders": {"momentum_dtype": "bf16", "master_weights": "remainder"},
        }.items()
    },
    "first momentum is the gradient": ("auto", {}, {"momentum_init": "gradient"}),
    "maximize": ("fused", {}, {"maximize": True}),
}
SAVED = {"momentum_dtype": "bf16", "master_weights": "remainder"}


def build(sharded: bool, kernel: str, precision: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Lion]:
    """A model with 7 x 9, 9, 9 x 2 and 2 parameters: no two ranks have as many of them, and a third rank has none."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9, **precision), torch.nn.Tanh(), torch.nn.Linear(9, 2, **precision))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, Lion(model.parameters(), lr=1e-2, weight_decay=0.1, kernel=kernel, **options)


def step(model: Any, optimizer: Lion, seed: int) -> None:
    """Backward pass and step; every rank has the same batch, and the mean over two ranks is exact."""
    dtype = next(model.parameters()).dtype
    batch = torch.randn(8, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model(batch).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def step_by_hand(model: Any, optimizer: Lion, seed: int) -> None:
    """A step with gradients that no number of ranks rounds in another way."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        whole = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = distribute_tensor(whole, param.device_mesh, param.placements)
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor: Any) -> torch.Tensor:
    tensor = tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor  # gloo gathers no int16
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def everything(model: Any, optimizer: Lion) -> list[torch.Tensor]:
    """Parameters and state, whole."""
    states = [optimizer.state[param] for param in model.parameters()]
    return [whole(tensor) for tensor in (*model.parameters(), *(value for state in states for value in state.values()))]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> str:
    equal = len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return "same bits" if equal else "other bits"


def compare_with_unsharded(case: str) -> str:
    runs = []
    for sharded in (False, True):
        model, optimizer = build(sharded, *CASES[case])
        for seed in range(3):
            step(model, optimizer, seed)
        runs.append(everything(model, optimizer))
    return same(*runs)


def gradient_with_a_pending_sum() -> str:
    """A gradient of which each rank has a part: its sign is that of the sum."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    part = torch.tensor([1.0, -3.0]) if torch.distributed.get_rank() == 0 else torch.tensor([-2.0, 1.0])
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    param.grad = DTensor.from_local(part, mesh, [Partial()])
    Lion([param], lr=1.0).step()
    return str(whole(param).tolist())


def refusal() -> str:
    try:
        build(True, "auto", {}, {"momentum_dtype": "int8"})
    except LionError as error:
        return str(error)
    return "none"


def saved(folder: Path) -> None:
    model, optimizer = build(True, "fused", BF16, SAVED)
    for seed in range(2):
        step_by_hand(model, optimizer, seed)
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    before = everything(model, optimizer)
    step_by_hand(model, optimizer, 2)
    after = everything(model, optimizer)
    if torch.distributed.get_rank() == 0:
        torch.save([before, after], folder / "expected.pt")


def resumed(folder: Path) -> dict[str, str]:
    model, optimizer = build(True, "reference", BF16, SAVED)
    weights, state = get_state_dict(model, optimizer)
    load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    before, after = torch.load(folder / "expected.pt")
    outcomes = {"loaded": same(everything(model, optimizer), before)}
    step_by_hand(model, optimizer, 2)
    return outcomes | {"next step": same(everything(model, optimizer), after)}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    what = sys.argv[1]
    if what == "steps":
        outcomes = {case: compare_with_unsharded(case) for case in CASES}
        outcomes |= {"pending sum": gradient_with_a_pending_sum(), "int8": refusal()}
    elif what == "save":
        saved(Path(sys.argv[2]))
        outcomes = {}
    else:
        outcomes = resumed(Path(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        for case, outcome in outcomes.items():
            print(f"CASE {case}: {outcome}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
