"""Steps on random tokens of this rank, to find what fails in a first step. This trains nothing."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat, loop_callbacks
from megatron_lion.integration.rehearsal import local_modules, step_meter


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


def prepare(args: Any, steps: int) -> None:
    """Let the loop end after ``steps`` steps."""
    args.train_iters = args.iteration + steps


@contextlib.contextmanager
def taking_over(steps: int, finish: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Replace the data by random tokens, and call ``finish`` after ``steps`` steps with what they took and sent.

    Messages are those of the last step: a first step does not gather weights that an earlier one has updated.
    """
    import megatron.training.training as training

    began, done, messages = [0.0], [0], step_meter.Messages()
    activations: list[step_meter.Activations] = []
    stock_train = training.train

    def iterators(provider: Any) -> tuple[Any, None, None]:
        args = training.get_args()
        args.do_train, args.do_valid, args.do_test = True, False, False
        return _random_batches(args), None, None

    def train(forward_step: Any, model_chunks: Any, *rest: Any, **named: Any) -> Any:
        began[0] = time.monotonic()
        activations.append(step_meter.Activations(param for chunk in model_chunks for param in chunk.parameters()))
        activations[0].start()
        with messages:
            return stock_train(forward_step, model_chunks, *rest, **named)

    def after_step(optimizer: Any, iteration: int) -> None:
        done[0] += 1
        if done[0] < steps:
            messages.clear()
            return
        finish(
            {
                "steps": steps,
                "seconds": time.monotonic() - began[0],
                "activations": activations[0].peak,
                "messages": messages.counted(),
            }
        )

    loop_callbacks.after_step.append(after_step)
    with compat.temporarily(training, build_train_valid_test_data_iterators=iterators, train=train):
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
