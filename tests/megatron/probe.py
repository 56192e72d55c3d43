"""Run under torchrun in the place of a pretraining script: build model and optimizer as Megatron's own loop does, then
inspect them instead of training.

    torchrun tests/megatron/probe.py WHAT <Megatron's flags>

WHAT is ``parameters`` (which optimizer, betas and state each parameter has), ``stock-parameters`` (the same without
this package's registration), ``sharded-step`` (the step inside Megatron against plain Lion) or ``non-finite`` (what a
bad gradient on the last rank alone changes, in the first parameter whose name has PROBE_BAD in it). PROBE_OUTPUT names
a folder, in which each rank leaves its answer as ``rank<N>.json``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import megatron_lion
from launch import pretrain_gpt
from megatron_lion.integration import compat
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from tools.compare_stock import owners, state_bytes, stock_on_cpu


def set_gradients(model: list[Any], seed: int, bad: float | None = None) -> dict[str, torch.Tensor]:
    """Fill every gradient buffer with the same values on every data-parallel rank; averaging copies of a number over a
    power of two of ranks gives that number back exactly. ``bad`` takes the place of one element, on the last rank
    alone. Returns the gradients by name."""
    gradients = {}
    for index, chunk in enumerate(model):
        chunk.zero_grad_buffer()
        for position, (name, param) in enumerate(chunk.named_parameters()):
            generator = torch.Generator().manual_seed(10_000 * seed + 100 * index + position)
            gradient = torch.randn(param.shape, generator=generator).to(param.main_grad.dtype)
            param.main_grad.copy_(gradient)
            gradients[f"{index}.{name}"] = gradient
        if bad is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            name = os.environ.get("PROBE_BAD", "")
            victim = next(param for full_name, param in chunk.named_parameters() if name in full_name)
            victim.main_grad.view(-1)[0] = bad
        if chunk.ddp_config.overlap_grad_reduce:  # else finish_grad_sync starts it
            chunk.start_grad_sync()
        chunk.finish_grad_sync()
    return gradients


def sharded_step(model: list[Any], optimizer: Any, steps: int = 5) -> dict[str, Any]:
    """Some steps of the optimizer inside Megatron, against :class:`Lion` on copies of the whole parameters.

    What differs: parameters, and this rank's shards of masters and momenta, fp32 values compared.
    """
    from megatron.training import get_args

    args = get_args()
    params = {f"{i}.{name}": param for i, chunk in enumerate(model) for name, param in chunk.named_parameters()}
    settings = {
        param: group for part in optimizer.chained_optimizers for param, _, group in compat.updated_params(part)
    }
    weight_decay = {name: settings[param]["weight_decay"] for name, param in params.items() if param in settings}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, weight_decay)  # a rank knows only the groups of its own shards
    weight_decay = {name: value for part in gathered for name, value in part.items()}

    copies = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    groups = [{"params": [copies[name]], "weight_decay": weight_decay[name]} for name in copies]
    group = optimizer.param_groups[0]
    stored = {"momentum_dtype": args.lion_momentum_dtype, "master_weights": args.lion_master_weights}
    plain = ShardedLion(groups, lr=group["lr"], betas=group["betas"], kernel="reference", **stored)
    plain.use_decoupled_grad = True
    for seed in range(steps):
        gradients = set_gradients(model, seed)
        for name, copy in copies.items():
            copy.decoupled_grad = gradients[name]
        optimizer.step()
        plain.step()
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:  # else step() gathers; here the next forward pass would
            chunk.start_param_sync(force_sync=True)
    different = [name for name, param in params.items() if not torch.equal(param, copies[name])]
    for name, param in params.items():
        for part in optimizer.chained_optimizers:
            if param in part.model_param_group_index_map:
                start, stop = compat.shard_range(part, param)
                shards = part._get_main_param_and_optimizer_states(param)
                for key, stock_name in (("exp_avg", "exp_avg"), ("param", "master_param")):
                    whole = plain.get_unscaled_state(copies[name], stock_name).view(-1)[start:stop]
                    different += [] if torch.equal(shards[key], whole) else [f"{name} {key}"]
    return {"parameters": len(params), "different": different}


def everything(model: list[Any], optimizer: Any) -> list[torch.Tensor]:
    """Copies of this rank's model parameters, main parameters and momenta."""
    tensors = [param for chunk in model for param in chunk.parameters()] + optimizer.get_parameters()
    for part in optimizer.chained_optimizers:
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in tensors]


def non_finite(model: list[Any], optimizer: Any) -> dict[str, Any]:
    """A good step, then one with NaN and one with inf in a single element on the last rank, then a good one."""
    answer: dict[str, Any] = {"applied": [], "changed": [], "scale": []}
    for seed, bad in enumerate((None, float("nan"), float("inf"), None)):
        if seed == 0:
            set_gradients(model, seed)
            optimizer.step()  # so that there is momentum to lose
        before = everything(model, optimizer)
        set_gradients(model, seed, bad=bad)
        answer["applied"].append(bool(optimizer.step()[0]))
        answer["scale"].append(float(optimizer.get_loss_scale()))
        after = everything(model, optimizer)
        answer["changed"].append(any(not torch.equal(one, two) for one, two in zip(before, after, strict=True)))
    return answer


def main() -> None:
    what = sys.argv.pop(1)
    if what == "stock-parameters":
        stock_on_cpu()
    else:
        megatron_lion.register()
    import megatron.training.training as training

    def inspect(forward_step: Any, model: list[Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if what in ("sharded-step", "non-finite"):
            answer = {"sharded-step": sharded_step, "non-finite": non_finite}[what](model, optimizer)
        else:
            answer = {"owners": owners(model, optimizer), "trainable": sum(len(list(c.parameters())) for c in model)}
            if what == "parameters":
                set_gradients(model, seed=0)
                optimizer.step()
                answer["state_bytes"] = state_bytes(optimizer)
        path = Path(os.environ["PROBE_OUTPUT"]) / f"rank{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(answer))
        return 0, 0

    training.train = inspect
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
