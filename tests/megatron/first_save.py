"""Saves before the first step, loads, and steps: every format that Megatron has, with Lion and SGD, on real ranks.

Prints one line for each case: whether the weights after two steps are those of an optimizer that was never saved.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

import megatron_lion
from tests.megatron import core_loop

COMPACT = {"lion_momentum_dtype": "int8", "lion_master_weights": "remainder"}
SGD = {"optimizer": "sgd", "sgd_momentum": 0.9}
# Format, whether parameters are bf16, whether state is sharded, the optimizer's configuration.
CASES: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {
    "lion fully_reshardable": ("fully_reshardable", True, True, {}),
    "lion dp_reshardable": ("dp_reshardable", True, True, {}),
    "lion legacy": ("legacy", True, True, {}),
    "lion not sharded": ("fully_reshardable", True, False, {}),
    "lion not sharded, fp32": ("fully_reshardable", False, False, {}),
    "compact lion fully_reshardable": ("fully_reshardable", True, True, COMPACT),
    "compact lion dp_reshardable": ("dp_reshardable", True, True, COMPACT),
    "sgd fully_reshardable": ("fully_reshardable", True, True, SGD),
    "sgd dp_reshardable": ("dp_reshardable", True, True, SGD),
    "sgd legacy": ("legacy", True, True, SGD),
    "sgd not sharded": ("fully_reshardable", True, False, SGD),
}


def build(sharding: str, bf16: bool, sharded: bool, options: dict[str, Any]) -> tuple[Namespace, Any, Any]:
    torch.manual_seed(1)
    args = core_loop.arguments(["--sharding", sharding, *(["--bf16"] if bf16 else [])])
    return args, *core_loop.build(args, sharded=sharded, **options)


def stepped(model: Any, optimizer: Any) -> list[torch.Tensor]:
    """The weights after two steps on made-up gradients."""
    for number in range(2):
        model.zero_grad_buffer()
        torch.manual_seed(number)
        for param in model.parameters():
            param.main_grad.copy_(torch.randn_like(param.main_grad))
        model.finish_grad_sync()
        applied, _, _ = optimizer.step()
        assert applied
    return [param.detach().float().clone() for param in model.parameters()]


def saved_and_loaded(case: tuple[str, bool, bool, dict[str, Any]], folder: Path) -> tuple[Any, Any]:
    """A model and an optimizer that were loaded from what another one saved before its first step."""
    from megatron.core import dist_checkpointing

    args, model, optimizer = build(*case)
    rank = torch.distributed.get_rank()
    if case[0] == "legacy":
        optimizer.save_parameter_state(str(folder / "state.pt"))
        torch.save(optimizer.state_dict(), folder / f"rank{rank}.pt")
    else:
        dist_checkpointing.save(core_loop.sharded_state(args, model, optimizer), str(folder))
    torch.distributed.barrier()
    args, model, optimizer = build(*case)
    if case[0] == "legacy":
        optimizer.load_state_dict(torch.load(folder / f"rank{rank}.pt", weights_only=False))
        optimizer.load_parameter_state(str(folder / "state.pt"))
    else:
        wanted = core_loop.sharded_state(args, model, optimizer, is_loading=True)
        optimizer.load_state_dict(dist_checkpointing.load(wanted, str(folder))["optimizer"])
    return model, optimizer


def main() -> None:
    megatron_lion.register()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    for name in sys.argv[1].split(",") if len(sys.argv) > 1 else CASES:
        folders = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(folders, src=0)
        folder = Path(str(folders[0]))
        try:
            _, model, optimizer = build(*CASES[name])
            never_saved = stepped(model, optimizer)
            loaded = stepped(*saved_and_loaded(CASES[name], folder))
            same = all(torch.equal(one, other) for one, other in zip(never_saved, loaded, strict=True))
            outcome = "same weights" if same else "other weights"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:200].replace("\n", " ")
        if torch.distributed.get_rank() == 0:
            print(f"CASE {name}: {outcome}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
