"""The processes of one run: alone, or as torchrun started them, each on a device of its own."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron_lion.stats import BatchShare


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run. Alone, nothing here is a collective."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` as it is called in training: averages its gradients over the ranks in the backward pass."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if self.device == "cpu" else [self.device])

    def sum(self, tensor: Tensor) -> None:
        """Add up over the ranks, in place; NCCL takes no tensor of the CPU."""
        if self.world > 1:
            there = tensor.to(self.device)
            torch.distributed.all_reduce(there)
            tensor.copy_(there)

    def take_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of the first: BatchNorm's statistics are each rank's own in training."""
        for buffer in model.buffers() if self.world > 1 else ():
            torch.distributed.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.sum(torch.zeros(1))

    def leave(self) -> None:
        """At the end, where NCCL would otherwise complain."""
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def share(self, batches: int) -> BatchShare | None:
        """Of the batches of a statistics pass."""
        if self.world == 1:
            return None
        return BatchShare(rank=self.rank, world=self.world, batches=batches, all_reduce=self.sum)


def join(device: str) -> Ranks:
    """The ranks that torchrun's variables tell of, over NCCL on GPUs, over gloo on CPUs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(device=device)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Ranks(rank=torch.distributed.get_rank(), world=world, device=device)
