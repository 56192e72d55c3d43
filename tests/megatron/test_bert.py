"""launch/pretrain_bert.py: Megatron-Core's BERT and its data set, in Megatron's own loop, on real sentences."""

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy
import prepare_text
import pytest
import torch
import train_tokenizer

from megatron_lion.config import LionError
from tests.harness import (
    BATCH,
    CPU,
    HORIZON,
    NO_DROPOUT,
    ROOT,
    Run,
    record_difference,
    records,
    relative_difference,
    run_ranks,
)

SCRIPT = ROOT / "launch" / "pretrain_bert.py"
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64"
RATE = "--lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1"
# Equal padded vocabularies at TP 1 and 2, and a checkpoint that can change its layout.
LAYOUT_FREE = (
    f"{NO_DROPOUT} --make-vocab-size-divisible-by 256 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
)
START, END = 2, 8
STEADY = f"--optimizer lion --lr 1e-4 --min-lr 1e-5 --train-iters {END} {HORIZON} {LAYOUT_FREE}"
LOGGED = re.compile(r"iteration\s+(\d+)/.*\| lm loss: (\S+) \| sop loss: (\S+) \| loss: (\S+) \|")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's help as sentences, in three splits, with a WordPiece vocabulary of 1,000."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("sentences")
    source = folder / "help.jsonl"
    source.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    kind = ["--tokenizer-type", "BertWordPieceLowerCase"]
    train_tokenizer.main(["--input", str(source), *kind, "--vocab-size", "1000", "--output", str(folder)])
    line = ["--input", str(source), "--output-prefix", str(folder / "help"), "--workers", "1", "--split", "8,1,1"]
    prepare_text.main([*line, "--split-sentences", *kind, "--vocab-file", str(folder / "vocab.txt")])
    return folder


def data_flags(folder: Path) -> str:
    splits = " ".join(
        f"--{split}-data-path {folder}/help_{split}_text_sentence" for split in ("train", "valid", "test")
    )
    return f"--tokenizer-type BertWordPieceLowerCase --vocab-file {folder}/vocab.txt {splits}"


def pretrain(folder: Path, *flags: str, ranks: int = 1) -> Run:
    run = run_ranks(MODEL, BATCH, RATE, CPU, data_flags(folder), *flags, ranks=ranks, script=SCRIPT)
    assert run.returncode == 0, run.output[-6000:]
    return run


def losses(run: Run) -> dict[int, tuple[float, float, float]]:
    """Iteration to masked-token, sentence-order and summed loss, as logged."""
    found = (LOGGED.search(line) for line in run.output.splitlines())
    return {int(m[1]): (float(m[2]), float(m[3]), float(m[4])) for m in found if m}


def rounds(file: Path) -> str:
    """Flags for a norm-ratio round at the last iteration."""
    return f"--norm-ratio-interval {END} --norm-ratio-batches 2 --norm-ratio-file {file}"


@pytest.fixture(scope="module")
def one_process(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Checkpoints after every second step, and the run that wrote them."""
    folder = tmp_path_factory.mktemp("bert")
    return folder, pretrain(sentences, STEADY, f"--save {folder} --save-interval {START}", rounds(folder / "one.jsonl"))


@pytest.mark.slow
def test_a_round_over_the_whole_split_is_the_same_on_two_ranks(sentences: Path, tmp_path: Path) -> None:
    """A micro-batch's loss is the mean over its masked tokens, so micro-batches are of the same samples."""
    split = f"--train-data-path {sentences}/help_valid_text_sentence {NO_DROPOUT}"
    found = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.jsonl"
        at_start = f"--norm-ratio-at-start --norm-ratio-batches all --norm-ratio-file {file}"
        pretrain(sentences, "--optimizer lion --train-iters 1", split, at_start, ranks=ranks)
        found += records(tmp_path, file.name)
    one, two = found
    assert one["exact"] and two["exact"] and one["tokens"] == two["tokens"]
    assert record_difference(one, two) < 5e-6


@pytest.mark.supports("BERT", "losses and norms of one process; both losses fall on real text")
@pytest.mark.slow
def test_tp2_pp2_gives_the_one_process_losses_and_norms(
    sentences: Path, one_process: tuple[Path, Run], tmp_path: Path
) -> None:
    folder, reference = one_process
    run = pretrain(
        sentences,
        f"{STEADY} --load {folder} --ckpt-step {START} --no-load-rng",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        rounds(tmp_path / "four.jsonl"),
        ranks=4,
    )
    assert sorted(losses(run)) == list(range(START + 1, END + 1))
    assert relative_difference(reference.log, run.log) < 5e-6
    for iteration in set(losses(run)) - {START + 2}:  # the second logged loss after a start is a mean of two
        expected = losses(reference)[iteration]
        assert losses(run)[iteration] == pytest.approx(expected, rel=2e-5), iteration
    one, four = (json.loads(file.read_text()) for file in (folder / "one.jsonl", tmp_path / "four.jsonl"))
    for key in ("iteration", "d", "l1", "l2", "loss"):
        assert four[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.supports("BERT", "losses and norms of one process; both losses fall on real text")
@pytest.mark.parametrize(
    "optimizer", ["lion", pytest.param("sgd", marks=pytest.mark.slow), pytest.param("adam", marks=pytest.mark.slow)]
)
def test_both_losses_fall_on_real_text_and_the_test_set_is_evaluated(
    sentences: Path, optimizer: str, tmp_path: Path
) -> None:
    rate = {"lion": "--lr 1e-3 --min-lr 1e-4", "sgd": "--lr 0.1 --min-lr 0.01", "adam": "--lr 3e-3 --min-lr 3e-4"}[
        optimizer
    ]
    run = pretrain(
        sentences,
        f"--optimizer {optimizer} {rate} --train-iters 80 --micro-batch-size 16 --global-batch-size 32 --eval-iters 4",
        f"--log-interval 20 {NO_DROPOUT}",
        f"--norm-ratio-interval 40 --norm-ratio-batches 2 --norm-ratio-file {tmp_path}/ratio.jsonl",
    )
    first, *_, last = losses(run).values()
    assert last[0] < first[0] - (0.3 if optimizer != "sgd" else 0.05), "masked tokens"
    assert last[1] < first[1], "sentence order"
    for lm_loss, sop_loss, total in losses(run).values():
        assert total == pytest.approx(lm_loss + sop_loss, rel=1e-5)
    assert re.search(r"on test set \| lm loss value: \S+ \| lm loss PPL: \S+ \| sop loss value: \S+", run.output)
    measured = [json.loads(line) for line in (tmp_path / "ratio.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in measured] == [40, 80]
    assert measured[1]["loss"] == pytest.approx(last[2], abs=0.3), "the sum of both losses"
    if optimizer == "lion":
        assert any("lion on 38 of 38 parameters" in line for line in run.ours())


@pytest.fixture(scope="module")
def samples(sentences: Path) -> list[dict[str, numpy.ndarray]]:
    """Samples of the data set that the script builds, read in this process."""
    from corpus.tokenizers import TokenizerOptions
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDatasetConfig
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from megatron_lion.integration.loop.pretrain import bert_dataset

    options = TokenizerOptions(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(sentences / "vocab.txt"))
    config = BERTMaskedWordPieceDatasetConfig(
        random_seed=7, sequence_length=64, tokenizer=options.build(), classification_head=True,
        blend_per_split=[([str(sentences / "help_train_text_sentence")], None), None, None],
        masking_probability=0.15, short_sequence_probability=0.1, masking_max_ngram=3, masking_do_full_word=True,
        masking_do_permutation=False, masking_use_longer_ngrams=False, masking_use_geometric_distribution=False,
    )  # fmt: skip
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        train, *_ = BlendedMegatronDatasetBuilder(bert_dataset(), [2000, 0, 0], lambda: True, config).build()
    finally:
        torch.distributed.destroy_process_group()
    return [train[index] for index in range(2000)]


def test_masks_and_swaps_follow_the_documented_rates(samples: list[dict[str, numpy.ndarray]]) -> None:
    """15 % of the tokens; of those 80 % [MASK], 10 % another token, 10 % themselves; half of the samples swapped."""
    masked = {"mask": 0, "other": 0, "same": 0}
    tokens = 0
    for sample in samples:
        chosen = sample["loss_mask"] == 1
        text, labels = sample["text"][chosen], sample["labels"][chosen]
        masked["mask"] += int((text == 4).sum())
        masked["same"] += int((text == labels).sum())
        masked["other"] += int(((text != 4) & (text != labels)).sum())
        tokens += int(sample["padding_mask"].sum())
        assert sample["text"][0] == 2 and (sample["text"] == 3).sum() >= 2, "[CLS], two [SEP]"
        assert not chosen[sample["padding_mask"] == 0].any()
    total = sum(masked.values())
    assert total / tokens == pytest.approx(0.15, abs=0.015)
    assert masked["mask"] / total == pytest.approx(0.8, abs=0.015)
    assert masked["other"] / total == pytest.approx(0.1, abs=0.015)
    assert masked["same"] / total == pytest.approx(0.1, abs=0.015)
    assert numpy.mean([sample["is_random"] for sample in samples]) == pytest.approx(0.5, abs=0.04)


def test_the_loss_is_the_masked_tokens_mean_plus_the_orders() -> None:
    """Against an independent sum in fp64."""
    from launch import pretrain_bert

    generator = torch.Generator().manual_seed(5)
    token_losses, order = torch.rand(4, 16, generator=generator) * 5, torch.randn(4, 2, generator=generator)
    mask, swapped = torch.randint(0, 2, (4, 16), generator=generator), torch.tensor([0, 1, 1, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_bert, "check_loss", lambda loss: None)
        loss, logged = pretrain_bert.loss_func(mask, swapped, (token_losses, order))
        alone, logged_alone = pretrain_bert.loss_func(mask, swapped, (token_losses, None))
    lm_loss = sum(
        value
        for row, keep in zip(token_losses.double().tolist(), mask.tolist(), strict=True)
        for value, k in zip(row, keep, strict=True)
        if k
    ) / int(mask.sum())
    logits = order.double()
    sop_loss = float(torch.stack([logits[i].exp().sum().log() - logits[i, swapped[i]] for i in range(4)]).mean())
    assert float(loss) == pytest.approx(lm_loss + sop_loss, rel=1e-6)
    assert {name: pair[0] / pair[1] for name, pair in ((n, v.tolist()) for n, v in logged.items())} == pytest.approx(
        {"lm loss": lm_loss, "sop loss": sop_loss, "loss": lm_loss + sop_loss}, rel=1e-6
    )
    assert float(alone) == pytest.approx(lm_loss, rel=1e-6) and list(logged_alone) == ["lm loss"]


def test_a_berts_checkpoint_is_not_evaluated_or_exported_as_a_gpts(one_process: tuple[Path, Run]) -> None:
    from evaluation import checkpoints

    with pytest.raises(LionError, match="has BERT, not a GPT"):
        checkpoints.require_gpt(checkpoints.iteration_folder(one_process[0], START))


def test_data_that_its_manifest_disowns_is_refused(sentences: Path, tmp_path: Path) -> None:
    """A .bin that was cut short, and another tokenizer's tokens."""
    from megatron_lion.integration.loop.vocabularies import check_data_manifests

    other = tmp_path / "vocab.txt"
    other.write_text((sentences / "vocab.txt").read_text().replace("class", "klass"))
    for path in sentences.glob("help_*.*"):  # not Megatron's cache of indices
        (tmp_path / path.name).write_bytes(path.read_bytes())
    prefix = tmp_path / "help_train_text_sentence"
    args = Namespace(
        data_path=["1.0", str(prefix)], train_data_path=None, valid_data_path=None, test_data_path=None,
        data_args_path=None, per_split_data_args_path=None,
        tokenizer_type="BertWordPieceLowerCase", vocab_file=str(sentences / "vocab.txt"),
    )  # fmt: skip
    check_data_manifests(args)
    whole = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(whole[:-2])
    with pytest.raises(LionError, match=r"help_train_text_sentence\.bin has .* bytes, and help_manifest\.json says"):
        check_data_manifests(args)
    Path(f"{prefix}.bin").write_bytes(whole)
    args.vocab_file = str(other)
    (tmp_path / "args.txt").write_text(f"0.3 {prefix}\n0.7 {prefix}\n")
    splits = {"train": str(prefix), "valid": ["1", str(prefix)], "test": None}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    (tmp_path / "only_test.json").write_text(json.dumps(splits | {"train": None, "valid": None, "test": [str(prefix)]}))
    linked = tmp_path / "elsewhere" / "linked"
    linked.parent.mkdir()
    for suffix in (".bin", ".idx"):
        Path(f"{linked}{suffix}").symlink_to(f"{prefix}{suffix}")
    for way in (
        {"data_path": ["1.0", str(prefix)]},
        {"data_path": [str(prefix)]},
        {"data_path": [str(linked)]},
        {"train_data_path": [str(prefix)]},
        {"test_data_path": ["0.5", str(prefix), "0.5", str(prefix)]},
        {"data_args_path": str(tmp_path / "args.txt")},
        {"per_split_data_args_path": str(tmp_path / "splits.json")},
        {"per_split_data_args_path": str(tmp_path / "only_test.json")},
    ):
        with pytest.raises(LionError, match=r"was made with BertWordPieceLowerCase vocab\.txt"):
            check_data_manifests(Namespace(**{**vars(args), "data_path": None, **way}))
    with pytest.raises(LionError, match=r"--data-args-path .*none\.txt .* cannot be read: FileNotFoundError"):
        check_data_manifests(Namespace(**{**vars(args), "data_path": None, "data_args_path": f"{tmp_path}/none.txt"}))


@pytest.mark.slow
def test_the_script_refuses_such_data_before_its_first_step(sentences: Path, tmp_path: Path) -> None:
    other = tmp_path / "vocab.txt"
    other.write_text((sentences / "vocab.txt").read_text().replace("class", "klass"))
    wrong = f"--vocab-file {other} --optimizer lion --train-iters 1"
    run = run_ranks(MODEL, BATCH, RATE, CPU, data_flags(sentences), wrong, script=SCRIPT)
    assert run.returncode != 0
    assert "was made with BertWordPieceLowerCase vocab.txt" in run.output and not losses(run)
