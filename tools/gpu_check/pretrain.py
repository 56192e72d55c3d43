"""launch/pretrain_gpt.py on one GPU, with the exact loss of every micro-batch and a digest of the trained weights.

    python -m tools.gpu_check.pretrain --name NAME --work FOLDER [--rows FILE] <Megatron's flags>

FOLDER receives NAME.json, and the text that all runs with this FOLDER are trained on. It is
one rank without a launcher, so no host name has to be resolved. Fails where
a loss is not finite, or the last one is not below the first.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tools.gpu_check import records, text


def one_rank() -> dict[str, str]:
    """The environment that torchrun would give the only rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def main() -> int:
    """Train, then record and check the losses."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--name", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    args, flags = parser.parse_known_args()
    os.environ.update(one_rank())
    prefix = args.work / "text"
    sys.argv = [sys.argv[0], "--data-path", str(prefix), *flags]
    without_strict_determinism()
    run = Recorded(prefix)
    try:
        run.main()
    except SystemExit as ended:  # as Megatron ends a run when its time is over
        if ended.code:
            raise
    finally:
        record = {"name": args.name, **run.results()}
        (args.work / f"{args.name}.json").write_text(json.dumps(record))
        brief = {key: value for key, value in record.items() if key != "losses"}
        records.append(args.rows, megatron=args.name, **brief)
    problem = loss_problem(record)
    if problem:
        print(problem)
    return int(bool(problem))


def loss_problem(record: dict[str, Any]) -> str | None:
    """Why the recorded losses are not those of a run that learns."""
    if not record["losses"]:
        return "no loss was recorded"
    finite = all(math.isfinite(float.fromhex(value)) for value in record["losses"])
    first, last = record["first_loss"], record["last_loss"]
    return None if finite and last < first else f"the loss must be finite and fall; it went from {first} to {last}"


def without_strict_determinism() -> None:
    """Let --deterministic-mode warn about an operation without a deterministic version, instead of ending the run.

    Whether two runs are equal is then seen in their losses.
    """
    stock = torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms = lambda mode, **_: stock(mode, warn_only=True)


class Recorded:
    """launch/pretrain_gpt.py, with its losses and its model kept."""

    def __init__(self, text_prefix: Path) -> None:
        self.text_prefix = text_prefix
        self.sums: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        self.starts: list[float] = []
        self.model: torch.nn.Module | None = None

    def main(self) -> None:
        """Run it with the command line in ``sys.argv``."""
        import megatron_lion

        megatron_lion.register()  # before Megatron is imported, as in the script
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):  # in the wheel: no make, no compiler
            import megatron.core.datasets.utils as utils

            utils.compile_helpers = lambda: None
        if not self.text_prefix.with_suffix(".idx").exists():
            text.write(self.text_prefix)
        import pretrain_gpt

        loss_func, forward_step = pretrain_gpt.loss_func, pretrain_gpt.forward_step

        def recorded_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
            loss, tokens, report = loss_func(loss_mask, losses)
            self.sums.append(loss.detach().clone())
            self.tokens.append(tokens)
            return loss, tokens, report

        def recorded_step(data_iterator: Any, model: torch.nn.Module) -> Any:
            self.model = model
            self.starts.append(time.perf_counter())
            return forward_step(data_iterator, model)

        pretrain_gpt.loss_func, pretrain_gpt.forward_step = recorded_loss, recorded_step
        pretrain_gpt.main()

    def results(self) -> dict[str, Any]:
        """Losses summed over tokens, exact, in hexadecimal; their first and last mean; the weights' digest; the time.

        ``milliseconds`` is the mean time of a micro-batch with its share of the step, over the second half of the run.
        """
        means = [total.item() / count.item() for total, count in zip(self.sums, self.tokens, strict=True)]
        later = self.starts[len(self.starts) // 2 :]
        digest, numel = hashlib.sha256(), 0
        for param in self.model.parameters() if self.model is not None else ():
            digest.update(param.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
            numel += param.numel()
        return {
            "losses": [total.item().hex() for total in self.sums],
            "first_loss": means[0] if means else None,
            "last_loss": means[-1] if means else None,
            "micro_batches": len(means),
            "milliseconds": 1e3 * (later[-1] - later[0]) / (len(later) - 1) if len(later) > 1 else None,
            "parameters": numel,
            "weights": digest.hexdigest(),
            "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        }


if __name__ == "__main__":
    sys.exit(main())
