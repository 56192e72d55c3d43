"""At every ``--log-interval``: the bits that ``--lion-gather signs`` sent, in the log, TensorBoard and W&B."""

from typing import Any

import torch

from megatron_lion.integration import console
from megatron_lion.integration.exchange.sign_gather import SignGather, gathers_of
from megatron_lion.integration.reporting import metrics

METRICS = ("gather_bits", "gather_exceptions", "gather_full")


def after_step(optimizer: Any, iteration: int) -> None:
    """Report the steps since the last report, if a log line is due."""
    from megatron.training import get_args

    if get_args().lion_gather == "signs" and iteration % get_args().log_interval == 0:
        report(gathers_of(optimizer), iteration)


def report(gathers: list[SignGather], iteration: int) -> None:
    """One line on rank 0, TensorBoard and W&B: means over all ranks. Issues two small all-reduces over all ranks."""
    since = [gather.take_sent() for gather in gathers]
    device = torch.cuda.current_device()
    sums = torch.tensor(
        [sum(getattr(sent, name) for sent in since) for name in ("nbytes", "elements", "exceptions")],
        dtype=torch.float64,
        device=device,
    )
    full = torch.tensor([sum(sent.full_gathers for sent in since)], device=device)
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(full, op=torch.distributed.ReduceOp.MAX)
    nbytes, elements, exceptions = sums.tolist()
    if not elements:  # DP=1, or no step was made
        return
    values = dict(zip(METRICS, (8 * nbytes / elements, exceptions / elements, float(full)), strict=True))
    console.say(
        f"step {iteration}: gather of signs: {values['gather_bits']:.2f} bits per parameter, "
        f"{values['gather_exceptions']:.3%} exceptions, {int(full)} full gathers"
    )
    metrics.write({f"lion/{name}": value for name, value in values.items()}, iteration)
