"""Ranges of a recipe's numbers, and Lion's settings against the others: refused here as the run would refuse them."""

import pytest

from launch.launcher import commands, estimates, main, recipe_checks, recipes
from launch.launcher.keys import KEYS
from megatron_lion.config import LionError
from tests.launch.recipe_cases import recipe

NUMBERS = [key for key, kind in KEYS.items() if kind in (int, float)]
# The keys that may be 0; all others must be greater.
MAY_BE_ZERO = {
    "gpu-peak-tflops", "gpu-link-gbps", "max-restarts", "num-workers", "norm-epsilon", "lr", "min-lr", "weight-decay",
    "adam-eps", "adam-beta1", "adam-beta2", "lion-beta1", "lion-beta2", "sgd-momentum", "clip-grad",
    "lion-gather-refresh", "lr-warmup-iters", "exit-interval", "eval-iters", "norm-ratio-interval", "hidden-dropout",
    "attention-dropout", "mask-prob", "short-seq-prob",
}  # fmt: skip
BELOW_ONE = {
    "adam-beta1", "adam-beta2", "lion-beta1", "lion-beta2", "sgd-momentum", "hidden-dropout", "attention-dropout",
    "mask-prob", "short-seq-prob",
}  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_outside_its_range_is_refused_by_name(key: str) -> None:
    outside = ["-1", "nan", "inf", "-inf", "1e999", "9" * 30] + ([] if key in MAY_BE_ZERO else ["0"])
    outside += ["1", "1.5"] if key in BELOW_ONE else []
    if KEYS[key] is float and key not in BELOW_ONE:
        outside.remove("9" * 30)
    for value in outside:
        with pytest.raises(LionError, match=f"^{key} ") as error:
            recipe("tiny_gpt", "lion", "cpu", f"{key}={value}")
        assert " must be " in str(error.value), value


@pytest.mark.parametrize("key", sorted(MAY_BE_ZERO - {"lr", "min-lr"}))
def test_zero_is_in_the_range_of_what_can_be_turned_off(key: str) -> None:
    optimizer = {"adam": "adamw", "sgd-": "sgd"}.get(key[:4], "lion")
    assert recipe("tiny_gpt", optimizer, "cpu", f"{key}=0")[key] == 0


def test_the_number_of_batches_of_a_round_has_megatrons_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["llama_130m", "lion", "h100x8", "--dry-run", "norm-ratio-interval=1000"]) == 0
    assert "100 batches every 1,000 steps" in capsys.readouterr().out


def test_a_round_at_the_start_needs_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    at_start = ["norm-ratio-interval=0", "norm-ratio-at-start=true", "norm-ratio-batches=all"]
    assert main.main(["tiny_gpt", "lion", "cpu", "--dry-run", *at_start]) == 0
    shown = capsys.readouterr().out
    assert "all batches before the first step\n" in shown
    assert " --norm-ratio-interval 0 --norm-ratio-batches all --norm-ratio-at-start --norm-ratio-file " in shown
    found = [estimates.memory(recipe("tiny_gpt", "lion", "cpu", *some)) for some in (at_start, at_start[:1])]
    assert found[0].round_copy > 0 == found[1].round_copy


# Overrides and flags after --, and the message of LionOptions.
CONTRADICTIONS = {
    "lion-master-weights=remainder": "this run has no bf16 parameters. Add --bf16, or use --lion-master-weights fp32",
    "lion-gather=signs use-distributed-optimizer=false": "--lion-gather signs needs --use-distributed-optimizer",
    "lion-momentum-dtype=int8 use-distributed-optimizer=false": (
        "--lion-momentum-dtype int8 needs --use-distributed-optimizer (also on one rank): add it"
    ),
    "lion-reduce=int8 use-distributed-optimizer=false": "--lion-reduce int8 needs --use-distributed-optimizer",
    "use-distributed-optimizer=false -- --use-precision-aware-optimizer": (
        "--use-precision-aware-optimizer needs --use-distributed-optimizer"
    ),
    "bf16=true lion-gather=signs -- --optimizer-cpu-offload": "is not supported with --optimizer-cpu-offload",
    "fp16=true lion-gather=signs -- --lion-kernel=fused": "with --lion-kernel fused and --fp16",
    "-- --lion-kernel fuse": "--lion-kernel 'fuse' is unknown",
    "-- --exp-avg-dtype fp8 --use-precision-aware-optimizer": "--exp-avg-dtype fp8 is not supported",
}


@pytest.mark.parametrize("line", CONTRADICTIONS, ids=str)
def test_settings_that_lion_refuses_are_refused_before_a_job_is_queued(line: str) -> None:
    with pytest.raises(LionError) as error:
        main.main(["tiny_gpt", "lion", "cpu", "--slurm", "--print", *line.split()])
    assert CONTRADICTIONS[line] in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "bf16=true lion-master-weights=remainder lion-momentum-dtype=int8 lion-gather=signs lion-reduce=int4",
        "use-distributed-optimizer=false lion-momentum-dtype=bf16 -- --use-megatron-fsdp --ckpt-format fsdp_dtensor",
        "bf16=true -- --use-precision-aware-optimizer --exp-avg-dtype bf16 --lion-kernel fused --lion-fast-norm",
    ],
)
def test_settings_that_lion_supports_are_not_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["tiny_gpt", "lion", "cpu", "--print", *line.split()]) == 0
    assert "torchrun" in capsys.readouterr().out


OF_LION = {
    "lion-beta1": "0.8", "lion-beta2": "0.99", "lion-momentum-dtype": "int8", "lion-master-weights": "remainder",
    "lion-gather": "signs", "lion-gather-refresh": "5", "lion-reduce": "int4", "lion-error-feedback": "none",
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_key_of_lion_is_refused_where_another_optimizer_would_ignore_it(optimizer: str) -> None:
    assert {key for key in KEYS if key.startswith("lion-")} == OF_LION.keys()
    name = {"adamw": "adam"}.get(optimizer, optimizer)
    for key, value in OF_LION.items():
        with pytest.raises(LionError, match=f"^{key} {value} has no effect with optimizer {name}: remove it"):
            recipe("tiny_gpt", optimizer, "cpu", f"{key}={value}")
    for flags in (["--lion-kernel", "fused"], ["--lion-fast-norm"], ["--lion-init-from", "adam"]):
        with pytest.raises(LionError, match=f"{flags[0][2:]} .* has no effect with optimizer {name}"):
            recipe_checks.check(recipes.resolve("tiny_gpt", optimizer, "cpu", []), flags)
    defaults = ["lion-beta1=0.9", "lion-momentum-dtype=fp32", "lion-gather=params", "lion-gather-refresh=0"]
    recipe("tiny_gpt", optimizer, "cpu", *defaults)


@pytest.mark.parametrize("key", ["run", "save", "load"])
def test_an_empty_folder_is_refused(key: str) -> None:
    with pytest.raises(LionError, match=f"^{key} is empty: use a folder, or remove the key for its default"):
        recipe("tiny_gpt", "lion", "cpu", f"{key}=")


@pytest.mark.parametrize(
    ("given", "save", "load"),
    [
        ([], "/r/checkpoints", "/r/checkpoints"),
        (["save=/s"], "/s", "/s"),
        (["load=/l"], "/r/checkpoints", "/l"),
        (["save=/s", "load=/l"], "/s", "/l"),
    ],
)
def test_a_run_resumes_from_where_it_saves_unless_it_loads_from_elsewhere(
    given: list[str], save: str, load: str
) -> None:
    flags = commands.training_flags(recipe("tiny_gpt", "lion", "cpu", "run=/r", *given), [])
    assert [flags[flags.index(flag) + 1] for flag in ("--save", "--load")] == [save, load]
