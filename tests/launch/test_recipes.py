"""Recipes as files and as command lines: the paper's values, what is refused before anything starts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.launcher import commands, estimates, main, recipe_checks, recipe_files, recipes, report
from megatron_lion.config import GATHERS, LionError
from tests.launch.recipe_cases import ROOT, recipe

LAUNCH = ROOT / "launch" / "launch.py"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("gpt2_small lion_paper", {"lr": 1e-5, "lion-beta1": 0.9, "lion-beta2": 0.95}),
        ("gpt2_medium sgd_paper", {"lr": 1e-4, "num-layers": 24, "hidden-size": 1024, "num-attention-heads": 16}),
        ("bert_small lion_paper", {"num-layers": 4, "hidden-size": 512, "num-attention-heads": 8}),
        ("bert_base sgd_paper_no_momentum", {"sgd-momentum": 0.0, "num-layers": 12, "hidden-size": 768}),
    ],
)
def test_the_papers_runs_have_the_papers_values(case: str, expected: dict[str, float]) -> None:
    found = recipe(*case.split(), "a100x16")
    assert {key: found[key] for key in expected} == expected
    assert (found["global-batch-size"], found["train-iters"], found.ranks) == (640, 50_000, 16)
    assert (found["norm-ratio-batches"], found["save-interval"], found["eval-interval"]) == (100, 10_000, 10_000)
    assert found["min-lr"] < found["lr"]
    assert found["min-lr"] < 1e-5 or found["optimizer"] != "lion"


def test_every_value_of_the_papers_recipes_names_its_source() -> None:
    files = [path for kind in ("models", "optimizers") for path in (recipe_files.CONFIGS / kind).glob("*.yaml")]
    for path in files:
        if path.stem.startswith("tiny"):
            assert "ours" in path.read_text().splitlines()[0] or "ours" in path.read_text().splitlines()[1]
            continue
        for line in path.read_text().splitlines():
            is_value = re.match(r" *[a-z0-9-]+: +[^ ]", line) and "{data}" not in line
            names_what_it_is = line.startswith(("script:", "optimizer:", "tokenizer-model:")) or "note:" in line
            assert not is_value or names_what_it_is or re.search(r"# .*\[(P|M|G|B|S|W|L|H|C|ours)\]", line), (
                f"{path.name}: {line}"
            )


# ---- what is refused: command line, and words that the message must hold ----

BROKEN = {
    "tiny_gtp lion cpu": ("unknown model 'tiny_gtp'", "did you mean 'tiny_gpt'?", "gpt2_small"),
    "tiny_gpt lino cpu": ("unknown optimizer 'lino'", "did you mean 'lion'?", "sgd_paper"),
    "tiny_gpt lion gpu": ("unknown cluster 'gpu'", "one_gpu"),
    "tiny_gpt lion mine.yaml": ("mine.yaml does not exist",),
    "tiny_gpt lion cpu hiden-size=64": ("'hiden-size' on the command line", "did you mean 'hidden-size'?", "after --"),
    "tiny_gpt lion cpu batch-size=64": ("did you mean 'global-batch-size' or 'micro-batch-size'? launch.py --help",),
    "tiny_gpt lion cpu learning_rate=1": ("did you mean 'lr'? launch.py --help",),
    "tiny_gpt lion cpu tp=2": ("did you mean 'tensor-model-parallel-size'?",),
    "tiny_gpt lion cpu xyzzyx=2": ("on the command line: launch.py --help lists the keys",),
    "tiny_gpt lion cpu valid-data-path=/x/owt.idx": ("valid-data-path /x/owt.idx names one of", "use /x/owt. Megatron"),
    "tiny_gpt lion cpu lr": ("'lr' is not key=value",),
    "tiny_gpt lion cpu num-layers=two": ("num-layers", "must be a whole number", "'two'"),
    "tiny_gpt lion cpu num-layers=2.5": ("num-layers", "must be a whole number", "2.5"),
    "tiny_gpt lion cpu lr=fast": ("lr", "must be a number", "'fast'"),
    "tiny_gpt lion cpu bf16=1": ("bf16", "must be true or false", "got '1'"),
    "tiny_gpt lion cpu train-iters=0": ("train-iters must be greater than 0",),
    "tiny_gpt lion cpu lr=-1": ("lr must be a finite number >= 0", "-1"),
    "tiny_gpt lion cpu lr=nan": ("lr must be a finite number", "nan"),
    "tiny_gpt lion cpu lion-beta2=1": ("lion-beta2 must be in [0, 1)", "got 1"),
    "tiny_gpt lion cpu lion-momentum-dtype=int4": ("lion-momentum-dtype", "int4", "int8"),
    "tiny_gpt sgd cpu sgd-momentum=1": ("sgd-momentum must be in [0, 1)", "got 1"),
    "tiny_gpt lion cpu hidden-dropout=1.5": ("hidden-dropout must be in [0, 1)",),
    "tiny_gpt lion cpu optimizer=lamb": ("optimizer 'lamb' is unknown", "adam, lion, sgd"),
    "tiny_gpt lion cpu lr-decay-style=cosin": ("lr-decay-style", "did you mean 'cosine'?"),
    "tiny_gpt lion cpu min-lr=1": ("min-lr 1 is greater than lr 0.001", "lower min-lr"),
    "tiny_gpt lion cpu lr-warmup-iters=300": ("lr-warmup-iters 300", "lr-decay-iters 300"),
    "tiny_gpt lion cpu num-attention-heads=3": ("hidden-size 128", "num-attention-heads 3", "1, 2, 4, 8, 16"),
    "gpt2_small lion h100x8 tensor-model-parallel-size=8": ("num-attention-heads 12", "size 8", "use one of 1, 2, 4"),
    "gpt2_small lion h100x8 pipeline-model-parallel-size=8": ("num-layers 12", "pipeline-model-parallel-size 8"),
    "tiny_gpt lion cpu seq-length=256": ("seq-length 256 is greater than max-position-embeddings 128",),
    "gpt2_small lion h100x8 tensor-model-parallel-size=3": ("TP 3 x PP 1 x CP 1", "a multiple of 3 GPUs", "are 8"),
    "gpt2_medium lion a100x16 tensor-model-parallel-size=16": (
        "size 16 exceeds gpus-per-node 8",
        "1, 2, 4, 8",
        "pipeline",
    ),
    "gpt2_small lion a100x16 global-batch-size=600": ("global-batch-size 600", "8 x 16", "512 or 640"),
    "gpt2_small lion a100x16 node-addresses=10.0.0.1": ("node-addresses lists 1 of 2 nodes (10.0.0.1)", "commas"),
    "gpt2_small lion a100x16 sequence-parallel=true": (
        "sequence-parallel needs a tensor-model-parallel-size of at least 2",
    ),
    "gpt2_small lion a100x16 fp16=true": ("bf16 and fp16 are both true",),
    "tiny_gpt lion cpu distributed-backend=nccl": ("device cpu with distributed-backend nccl", "backend=gloo"),
    "tiny_gpt lion cpu transformer-impl=transformer_engine": ("needs a GPU", "transformer-impl=local"),
    "gpt2_small lion one_gpu gpu-memory-gib=4": ("more than gpu-memory-gib 4", "lower micro-batch-size"),
    "gpt2_small lion one_gpu gpu-memory-gib=1": (
        "more than gpu-memory-gib 1",
        "raise nodes or tensor-model-parallel-size",
    ),
    "tiny_gpt lion cpu run={run}/x": ("run: '{run}/x' names {run}, which names itself",),
    "tiny_gpt lion cpu data={run}/text run={data}/x": ("names {data}, which names itself",),
    "tiny_gpt lion cpu data=~/text master-port=70000": ("master-port must be in [1, 64536], got 70000",),
    "tiny_gpt lion cpu norm-ratio-interval=-1": ("norm-ratio-interval must be >= 0",),
    "tiny_gpt lion cpu norm-ratio-batches=0": ("norm-ratio-batches must be greater than 0, got 0",),
    "llama_7b adamw h100x32 lion-gather=signs": ("lion-gather signs has no effect with optimizer adam", "remove it"),
    "llama_7b sgd_paper h100x32 lion-reduce=int4": ("lion-reduce int4 has no effect with optimizer sgd",),
    "llama_7b lion h100x32 lion-error-feedback=none": ("no effect without --lion-reduce",),
    "llama_7b lion h100x32 lion-gather-refresh=9": ("no effect without --lion-gather signs",),
    "tiny_gpt lion cpu norm-ratio-batches=most": ("norm-ratio-batches", "must be a whole number", "'most'"),
}


@pytest.mark.parametrize("line", BROKEN, ids=str)
def test_a_broken_recipe_is_refused_with_the_key_and_the_fix(line: str) -> None:
    with pytest.raises(LionError) as error:
        recipe_checks.check(recipes.resolve(*line.split()[:3], line.split()[3:]))
    assert [word for word in BROKEN[line] if word not in str(error.value)] == [], str(error.value)


def test_a_round_may_read_the_whole_split() -> None:
    flags = commands.training_flags(recipe("tiny_gpt", "lion", "cpu", "norm-ratio-batches=all"), [])
    assert flags[flags.index("--norm-ratio-batches") + 1] == "all"


def test_the_norm_ratios_companions_go_with_it() -> None:
    """Megatron's parser, as this package extends it, refuses them alone."""
    flags = commands.training_flags(recipe("tiny_gpt", "lion", "cpu", "norm-ratio-interval=0"), [])
    assert [flag for flag in flags if "norm-ratio" in flag or "norm_ratio" in flag] == []


def test_files_that_are_not_there_are_named_by_their_keys(tmp_path: Path) -> None:
    found = recipe("tiny_gpt", "lion", "cpu", f"data={tmp_path}")
    (tmp_path / "valid_text_document.bin").write_text("x")
    (tmp_path / "test_text_document.idx").touch()  # empty
    with pytest.raises(
        LionError,
        match=r"empty.*: train-data-path: .*\.bin and \.idx; valid-data-path: .*document\.idx; test-.*and \.idx.*data=",
    ) as e:
        recipe_checks.check_files(found)
    assert f"tokenizer-model: {tmp_path}/tokenizer.model" in str(e.value)
    assert "tools/demo_text.py" in str(e.value)


def test_a_key_in_two_files_and_a_file_that_is_no_table_are_refused(tmp_path: Path) -> None:
    twice, text, cut = tmp_path / "twice.yaml", tmp_path / "text.yaml", tmp_path / "cut.yaml"
    twice.write_text("optimizer: lion\nhidden-size: 3\n")
    text.write_text("lion\n")
    cut.write_text("lr: {1\n")
    for path, words in ((twice, "hidden-size is set in both"), (text, "must hold one table"), (cut, "cannot be read")):
        with pytest.raises(LionError, match=words):
            recipes.resolve("tiny_gpt", str(path), "cpu", [])


def test_a_recipe_without_a_needed_key_says_which(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("optimizer: lion\n")
    with pytest.raises(LionError, match=r"does not set lr, weight-decay: add it to a file, or as lr="):
        recipe_checks.check(recipes.resolve("gpt2_small", str(own), "cpu", []))


def test_overrides_win_over_the_models_own_values_and_those_over_the_optimizers() -> None:
    assert recipe("llama_520m", "adamw", "a100x16")["lr"] == 4e-3
    assert recipe("tiny_gpt", "lion", "cpu")["weight-decay"] == 0.1
    assert recipe("tiny_gpt", "lion", "cpu", "weight-decay=0.3", "lr=2e-3")["lr"] == 2e-3


# ---- estimates ----


def test_parameter_counts_are_those_of_the_models() -> None:
    """GPT-2 with its 50,257 rows padded to 50,304; BERT-Base's 109.48M without the head and with 30,522 rows."""
    assert estimates.total_parameters(recipe("gpt2_small", "lion_paper", "a100x16")) == 124_439_808 + 47 * 768
    assert estimates.total_parameters(recipe("gpt2_medium", "lion", "a100x16")) == 354_823_168 + 47 * 1024
    for model in ("gpt2_small", "bert_base"):
        whole = estimates.parameters(recipe(model, "lion_paper", "h100x8"))
        split = recipe(model, "lion_paper", "h100x8", "pipeline-model-parallel-size=2")
        tied = estimates.padded_vocabulary(split) * split["hidden-size"]
        assert sum(estimates.parameters(split)) == sum(whole) + tied
        assert estimates.total_parameters(split) == sum(whole)


def test_state_bytes_follow_optimizer_precision_and_sharding() -> None:
    count = 124_475_904
    for optimizer, moments in (("lion_paper", 1), ("sgd_paper", 1), ("sgd_paper_no_momentum", 0), ("adamw", 2)):
        needed = estimates.memory(recipe("gpt2_small", optimizer, "a100x16"))
        assert (needed.weights, needed.gradients) == (2 * count, 4 * count)
        assert needed.state == pytest.approx(4 * (1 + moments) * count / 16, abs=32)
        alone = estimates.memory(recipe("gpt2_small", optimizer, "a100x16", "use-distributed-optimizer=false"))
        assert alone.state == 4 * (1 + moments) * count
        fp32 = estimates.memory(recipe("gpt2_small", optimizer, "a100x16", "bf16=false"))
        assert (fp32.weights, fp32.state) == (4 * count, pytest.approx(4 * moments * count / 16, abs=32))
    off = estimates.memory(recipe("gpt2_small", "lion", "a100x16"))
    on = estimates.memory(recipe("gpt2_small", "lion_paper", "a100x16"))
    assert off.round_copy == 0 < on.round_copy


def test_bytes_on_the_wire_follow_the_layout() -> None:
    alone = estimates.wire_bytes_per_step(recipe("gpt2_small", "lion", "one_gpu"))
    assert set(alone.values()) == {0}
    data = estimates.wire_bytes_per_step(recipe("gpt2_small", "lion", "a100x16"))
    assert data["data parallel"] == pytest.approx(124_475_904 * 6 * 15 / 16, rel=1e-9)
    mixed = recipe("gpt2_small", "lion", "h100x8", "tensor-model-parallel-size=2", "pipeline-model-parallel-size=2")
    sent = estimates.wire_bytes_per_step(mixed)
    block = 1024 * 8 * 768 * 2
    assert sent["pipeline parallel"] == 2 * block * 40
    assert sent["tensor parallel"] == 8 / 2 * block * 40 * 6  # 4 all-reduces x 2 passes x (t - 1) / t


def test_signs_are_a_fifth_of_the_gathered_bytes() -> None:
    params, signs = (recipe("gpt2_small", "lion", "a100x16", f"lion-gather={gather}") for gather in GATHERS)
    assert estimates.gather_bytes(params, "params") == round(124_475_904 * 2 * 15 / 16)
    assert estimates.gather_bytes(params, "signs") * 5 == pytest.approx(estimates.gather_bytes(params, "params"))
    saved = (
        estimates.wire_bytes_per_step(params)["data parallel"] - estimates.wire_bytes_per_step(signs)["data parallel"]
    )
    assert saved == pytest.approx(124_475_904 * 12.8 / 8 * 15 / 16)
    # 8 links of 200 Gb/s carry a node's ring; one GPU's NVLink where there is one node.
    assert estimates.gather_seconds(params, "params") == pytest.approx(124_475_904 * 16 * 15 / 16 / 1600e9)
    one_node = recipe("gpt2_small", "lion", "h100x8")
    assert estimates.gather_seconds(one_node, "params") == pytest.approx(124_475_904 * 16 * 7 / 8 / 3600e9)
    fp32 = recipe("gpt2_small", "lion", "a100x16", "bf16=false")
    assert estimates.gather_bytes(fp32, "signs") * 20 == pytest.approx(estimates.gather_bytes(fp32, "params"))


def test_the_report_compares_both_gathers() -> None:
    text = report.report(recipe("gpt2_small", "lion", "a100x16", "lion-gather=signs"), [])
    (line,) = (line for line in text.splitlines() if line.strip().startswith("gather after a step"))
    assert "lion-gather=signs 44.52 MiB (0.233 ms at 200 Gb/s); with lion-gather=params 0.22 GiB (1.17 ms" in line
    assert "--lion-gather signs" in text


def test_packed_gradients_are_fewer_bytes_and_keep_a_residual() -> None:
    count = 124_475_904
    stock, packed = (recipe("gpt2_small", "lion", "a100x16", f"lion-reduce={name}") for name in ("stock", "int4"))
    assert estimates.reduce_bytes(stock) == (round(count * 4 * 15 / 16), 0)
    # Two nodes of 8: fp32 inside, then an eighth of the parameters to the other node.
    assert estimates.reduce_bytes(packed) == (round(count * 4 * 7 / 8), round(count / 8 / 2 * 4.25 / 8))
    assert estimates.memory(stock).residual == 0
    assert estimates.memory(packed).residual == round(count / 8 / 2 * 66 / 64)
    flat = recipe("gpt2_small", "lion", "h100x8", "lion-reduce=ternary", "lion-error-feedback=bf16")
    assert estimates.reduce_bytes(flat) == (0, round(count * 1.85 / 8 * 7 / 8))
    assert estimates.memory(flat).residual == round(count * 2 * 7 / 8)
    sent = estimates.wire_bytes_per_step(flat)["data parallel"]
    assert sent == pytest.approx(count * (1.85 + 16) / 8 * 7 / 8)
    without = recipe("gpt2_small", "lion", "a100x16", "lion-reduce=int4", "lion-error-feedback=none")
    assert estimates.memory(without).residual == 0
    text = report.report(packed, [])
    (line,) = (line for line in text.splitlines() if line.strip().startswith("reduction of gradients"))
    assert "int4 3.94 MiB after 0.41 GiB inside the node (experimental); with lion-reduce=stock 0.43 GiB" in line
    assert "--lion-reduce int4" in text


# ---- the command itself ----


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCH), *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    for arguments in (
        ("tiny_gpt", "lion", "cpu", "lrr=1"),
        ("tiny_gpt", "lion", "cpu"),
        ("tiny_gpt", "lion", "cpu", "--slurm"),
    ):
        done = start(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("megatron-lion: error: ")
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_several_nodes_are_not_started_from_one(tmp_path: Path) -> None:
    with pytest.raises(LionError, match=r"2 nodes cannot be started from here: use --slurm, or --print"):
        main.run_here(recipe("gpt2_small", "lion", "a100x16", f"run={tmp_path}/run"), [])
    assert list(tmp_path.iterdir()) == []


def test_a_run_here_names_what_a_gpu_recipe_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    gpus = [0]
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus[0])
    monkeypatch.setattr(recipe_checks, "_is_installed", found.__contains__)

    def refused(reason: str, *overrides: str) -> None:
        with pytest.raises(LionError, match=reason):
            main.run_here(recipe("tiny_gpt", "lion", "one_gpu", f"run={tmp_path}/run", *overrides), [])
        assert list(tmp_path.iterdir()) == []

    refused("gpus-per-node is 1, but torch sees 0 GPUs here")
    gpus[0] = 1
    refused("Transformer Engine is not installed here: install it, or use transformer-impl=local")
    refused("fuses gradient accumulation with NVIDIA's Apex", "transformer-impl=local")
    found.append("transformer_engine")
    refused("is not installed here: install it, or use no-gradient-accumulation-fusion=true")
    recipe_checks.check_gpus(recipe("tiny_gpt", "lion", "one_gpu", "no-gradient-accumulation-fusion=true"))
    found.append("fused_weight_gradient_mlp_cuda")
    recipe_checks.check_gpus(recipe("tiny_gpt", "lion", "one_gpu"))


def test_megatron_fsdp_is_refused_with_the_variable_that_it_does_not_start_with() -> None:
    fsdp = ["--", "--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"]
    with pytest.raises(LionError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1, which the cluster h100x8 sets under"):
        main.main(["llama_130m", "lion", "h100x8", "--dry-run", *fsdp])
    recipe_checks.check(recipe("tiny_gpt", "lion", "cpu"), fsdp[1:])


def test_the_printed_lines_meet_at_the_address_given() -> None:
    printed = commands.printed(recipe("gpt2_small", "lion", "a100x16", "master-address=node7", "master-port=1234"), [])
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node7:1234 --rdzv-id gpt2_small-lion-a100x16" in printed
    assert printed.splitlines()[0] == "# on each of 2 nodes"
    assert len(printed.splitlines()) == 2


def test_every_node_gets_its_own_address_and_the_first_is_the_host() -> None:
    overrides = ["node-addresses=10.0.0.1, 10.0.0.2", "master-port=1234"]
    lines = commands.printed(recipe("gpt2_small", "lion", "a100x16", *overrides), []).splitlines()[1::2]
    assert [" --rdzv-endpoint 10.0.0.1:1234 " in line for line in lines] == [True, True]
    assert " --local-addr 10.0.0.1 --rdzv-conf join_timeout=600,is_host=true " in lines[0]
    assert " --local-addr 10.0.0.2 --rdzv-conf join_timeout=600,is_host=false " in lines[1]
