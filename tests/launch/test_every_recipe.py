"""Every model with every optimizer on the cpu cluster: a few steps of the line that launch.py makes, on real text."""

import json
import math
from pathlib import Path

import prepare_text
import pytest
import train_tokenizer

from launch.launcher import commands, recipe_checks
from tests.harness import ROOT, run_ranks
from tests.launch.recipe_cases import PAIRS, recipe

# All that differs from the recipes: how long they run, and for those of the paper how large the model and batch are.
SHORT = (
    "train-iters=4", "lr-decay-iters=4", "lr-warmup-iters=1", "log-interval=1", "eval-interval=4", "eval-iters=1",
    "save-interval=4", "norm-ratio-interval=2", "norm-ratio-batches=2",
)  # fmt: skip
SMALL = (
    "num-layers=2", "hidden-size=64", "num-attention-heads=4", "seq-length=64", "max-position-embeddings=64",
    "global-batch-size=16", "micro-batch-size=4",
)  # fmt: skip
IN_CI = {("tiny_bert", "lion"), ("gpt2_small", "sgd_paper"), ("llama_7b", "lion")}
RUNS = [
    pytest.param(model, optimizer, marks=[] if (model, optimizer) in IN_CI else pytest.mark.slow)
    for model, optimizers in PAIRS.items()
    for optimizer in optimizers
]


@pytest.fixture(scope="module")
def corpora(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The setting ``data`` for each tokenizer that a recipe has, with the files where the recipes expect them."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("corpora")
    source = folder / "help.jsonl"
    source.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    found = {"SentencePieceTokenizer": str(text)}
    for kind, more in (("GPT2BPETokenizer", ["--append-eod"]), ("BertWordPieceLowerCase", ["--split-sentences"])):
        data = folder / kind
        named = ["--tokenizer-type", kind]
        train_tokenizer.main(["--input", str(source), *named, "--vocab-size", "600", "--output", str(data)])
        names = {"--vocab-file": "vocab.json", "--merge-file": "merges.txt"}
        files = names if kind == "GPT2BPETokenizer" else {"--vocab-file": "vocab.txt"}
        flags = [word for flag, name in files.items() for word in (flag, str(data / name))]
        line = ["--input", str(source), "--output-prefix", str(data), "--workers", "1", "--split", "8,1,1"]
        assert prepare_text.main([*line, *named, *flags, *more]) == 0
        found[kind] = str(data)
    return found


@pytest.mark.parametrize(("model", "optimizer"), RUNS)
def test_the_recipe_trains_measures_evaluates_and_saves(
    model: str, optimizer: str, text: Path, corpora: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = recipe(model, optimizer, "cpu")["tokenizer-type"]
    size = [] if model.startswith("tiny_") else [*SMALL]
    if model.startswith("llama_"):
        size += ["ffn-hidden-size=128", f"tokenizer-model={text}/tokenizer.model"]
        size += [f"{split}-data-path={text}/{split}_text_document" for split in ("train", "valid", "test")]
        tokenizer = "SentencePieceTokenizer"
        size.append(f"tokenizer-type={tokenizer}")
    found = recipe(model, optimizer, "cpu", *SHORT, *size, f"data={corpora[tokenizer]}", f"run={tmp_path}/run")
    recipe_checks.check_files(found)
    flags = commands.training_flags(found, [])
    run = run_ranks(*flags, ranks=found.ranks, script=ROOT / "launch" / found["script"], environment=found.environment)
    assert run.returncode == 0, run.output[-5000:]
    assert sorted(run.log.loss) == [1, 2, 3, 4] and all(map(math.isfinite, run.log.loss.values()))
    assert set(run.log.final) == {"validation", "test"}
    assert ("sop loss" in run.output) == ("bert" in model)
    assert any("lion on" in line for line in run.ours()) == optimizer.startswith("lion")
    rounds = [json.loads(line) for line in (tmp_path / "run" / "norm_ratio.jsonl").read_text().splitlines()]
    assert [one["iteration"] for one in rounds] == [2, 4]
    assert (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"
