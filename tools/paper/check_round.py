"""Check an exact round of a long run with another model, in float64.

    python -m tools.paper.check_round --run runs/long/gpt-lion_paper-1234 --data runs/long/text/gpt/fixed_text_document

The checkpoint becomes a Hugging Face GPT-2 (tools/export_hf.py) in float64. One process goes over the whole split, each
sample once, and takes loss, l1, l2 and r = l1/l2 from autograd. Only the order of the documents is Megatron's, from the
run's data cache. Ends with status 1 where a number differs from the round's by more than 1e-6 of it.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from megatron_lion.stats.writer import read_records

EXPORT = Path(__file__).resolve().parents[1] / "export_hf.py"
TOLERANCE = 1e-6
SAMPLES_AT_A_TIME = 64


def samples(data: Path, cache: Path, length: int) -> Tensor:
    """Each sample of the split once: [samples, length + 1] tokens. A sample begins with the last token of the one
    before. Raises LionError where ``cache`` has no order of the documents.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(str(data))
    tokens = numpy.concatenate([documents[int(number)] for number in _document_order(data, cache, length)])
    windows = numpy.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    return torch.from_numpy(windows.astype(numpy.int64))


def _document_order(data: Path, cache: Path, length: int) -> numpy.ndarray:
    for description in sorted(cache.glob("*-GPTDataset-train-description.txt")):
        known = json.loads(description.read_text(encoding="utf-8"))
        one_epoch = known["num_samples"] is None and known["sequence_length"] == length
        if one_epoch and Path(known["dataset_path"]) == data:
            order: numpy.ndarray = numpy.load(str(description).replace("description.txt", "document_index.npy"))
            return order
    raise LionError(f"{cache} has no index of one epoch of {data}: use the --data of the run's exact rounds")


def load(checkpoints: Path, step: int) -> torch.nn.Module:
    """The checkpoint as a Hugging Face model in float64, without dropout."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXPORT), "--checkpoints", str(checkpoints), "--step", str(step)]
        if subprocess.run([*command, "--output", f"{folder}/model"], check=False).returncode:
            raise LionError("tools/export_hf.py failed; its error is above")
        model = GPT2LMHeadModel.from_pretrained(f"{folder}/model", attn_implementation="eager")
    return model.double().eval()


def measure(model: torch.nn.Module, split: Tensor) -> dict[str, float]:
    """Loss, l1, l2 and r of the mean loss over all tokens of ``split``, by float64 autograd."""
    targets = split[:, 1:].numel()
    total = 0.0
    for batch in split.split(SAMPLES_AT_A_TIME):
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        (loss / targets).backward()
        total += loss.item()
    gradient = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])
    l1, l2 = gradient.abs().sum().item(), gradient.norm().item()
    return {"loss": total / targets, "l1": l1, "l2": l2, "ratio": l1 / l2}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="folder of a GPT run of tools/paper/long_runs.py")
    add("--data", type=Path, required=True, metavar="PREFIX", help="of the fixed split's .bin and .idx")
    add("--step", type=int, default=50_000, help="a step with a checkpoint and an exact round (default: %(default)s)")
    options = parser.parse_args()
    options.record = options.run / f"exact-{options.step}" / "norm_ratio.jsonl"
    if not options.record.is_file():
        raise LionError(f"{options.record} does not exist: use a --run and a --step with an exact round")
    return options


def main() -> int:
    """Compare; returns the exit status."""
    options = parse()
    (record, *_) = read_records(options.record)
    settings = json.loads((options.run / "recipe.json").read_text(encoding="utf-8"))["settings"]
    split = samples(options.data.resolve(), options.run.resolve() / "cache", settings["seq-length"])
    if split[:, 1:].numel() != record["tokens"]:
        raise LionError(f"{options.data} has {split[:, 1:].numel():,} targets, the round {record['tokens']:,}")
    found = measure(load(options.run / "checkpoints", options.step), split)
    differences = {key: abs(record[key] / value - 1) for key, value in found.items()}
    print(f"{options.run.name}, step {options.step:,}, {len(split):,} samples of {settings['seq-length']} tokens")
    print(f"{'':6}{'round':>16}{'float64':>16}{'difference':>12}")
    for key, value in found.items():
        print(f"{key:6}{record[key]:16.9g}{value:16.9g}{differences[key]:12.1e}")
    return 0 if math.isfinite(sum(found.values())) and max(differences.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
