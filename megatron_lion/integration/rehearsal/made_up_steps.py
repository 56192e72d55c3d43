"""Steps on random tokens of this rank, to find what fails in a first step. This trains nothing."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat, loop_callbacks
from megatron_lion.integration.rehearsal import local_modules

_saved: dict[str, int] = {}


def check(args: Any) -> None:
    """Raise LionError where a step cannot be computed without a GPU. Turns off what would be saved."""
    if flags := local_modules.only_te_attention(args):
        raise LionError(
            f"--steps is not supported with {flags[0]}, which Megatron's local attention cannot compute. Rehearse "
            "without --steps, or without the flag"
        )
    args.save = None
    args.norm_ratio_interval = 0
    args.lion_telemetry = False
    args.rerun_mode = "disabled"
    args.check_for_nan_in_loss_and_grad = False  # the losses of made-up data mean nothing


def prepare(args: Any, model_chunks: list[Any], steps: int) -> None:
    """Let the loop end after ``steps`` steps, and count what a first forward pass keeps for its backward pass."""
    args.train_iters = args.iteration + steps
    _saved.clear()
    for chunk in model_chunks:
        _count_saved_tensors(chunk)


@contextlib.contextmanager
def taking_over(steps: int, finish: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Replace the data by random tokens, and call ``finish`` after ``steps`` steps."""
    import megatron.training.training as training

    began, done = [time.monotonic()], [0]

    def iterators(provider: Any) -> tuple[Any, None, None]:
        args = training.get_args()
        args.do_train, args.do_valid, args.do_test = True, False, False
        began[0] = time.monotonic()
        return _random_batches(args), None, None

    def after_step(optimizer: Any, iteration: int) -> None:
        done[0] += 1
        if done[0] >= steps:
            finish({"steps": done[0], "seconds": time.monotonic() - began[0], "activations": sum(_saved.values())})

    loop_callbacks.after_step.append(after_step)
    with compat.temporarily(training, build_train_valid_test_data_iterators=iterators):
        yield


def _random_batches(args: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches with what GPT's and BERT's data sets have: random tokens, every one of them counted."""
    generator = torch.Generator().manual_seed(args.seed + args.rank)
    shape = (args.micro_batch_size, args.seq_length)
    mask = torch.ones(args.seq_length, args.seq_length).tril() < 0.5
    while True:
        tokens, labels = (torch.randint(args.padded_vocab_size, shape, generator=generator) for _ in range(2))
        yield {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(args.seq_length).expand(shape).contiguous(),
            "attention_mask": mask.expand(args.micro_batch_size, 1, *mask.shape).contiguous(),
            "text": tokens,
            "types": torch.zeros(shape, dtype=torch.int64),
            "is_random": torch.zeros(args.micro_batch_size, dtype=torch.int64),
            "padding_mask": torch.ones(shape, dtype=torch.int64),
            "truncated": torch.zeros(args.micro_batch_size, dtype=torch.int64),
        }


def _count_saved_tensors(chunk: torch.nn.Module) -> None:
    """Add up the memory that autograd keeps from the first forward pass of ``chunk``, without its parameters."""
    known = {param.untyped_storage().data_ptr() for param in chunk.parameters()}
    hooks: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            _saved[f"{id(chunk)} {storage.data_ptr()}"] = storage.nbytes()
        return tensor

    def begin(*_: Any) -> None:
        hooks.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        hooks[-1].__enter__()

    def end(*_: Any) -> None:
        hooks.pop().__exit__(None, None, None)
        for handle in handles:
            handle.remove()

    handles = [chunk.register_forward_pre_hook(begin), chunk.register_forward_hook(end)]
