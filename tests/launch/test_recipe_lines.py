"""Command lines of all recipes: a few golden ones, and what must hold for each."""

import itertools
import shlex
from typing import Any

import pytest
import yaml

from launch.launcher import commands
from tests.launch.recipe_cases import CASES, CLUSTERS, GOLDEN, MODELS, OPTIMIZERS, PAPER, ROOT, golden_lines, recipe


def test_golden_command_lines() -> None:
    assert golden_lines() == GOLDEN.read_text().splitlines()


def test_configs_holds_the_recipes_that_are_tested() -> None:
    for kind, names in (("models", MODELS), ("optimizers", OPTIMIZERS), ("clusters", CLUSTERS)):
        assert sorted(path.stem for path in (ROOT / "configs" / kind).iterdir()) == sorted(names)


def flags_of(words: list[str]) -> dict[str, str | None]:
    """Each flag of a command line with its value, None for a switch; fails where one is there twice."""
    flags = [word for word in words if word.startswith("--")]
    assert len(flags) == len(set(flags)), sorted(flag for flag in flags if flags.count(flag) > 1)
    return {
        word: None if following.startswith("--") else following
        for word, following in itertools.pairwise([*words, "--"])
        if word.startswith("--")
    }


def read_config(kind: str, name: str) -> dict[str, Any]:
    """The file in configs/ as YAML has it."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "configs" / kind / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_line_has_its_optimizers_rates_its_clusters_ranks_and_its_models_size(case: tuple[str, str, str]) -> None:
    model, optimizer, cluster = map(read_config, ("models", "optimizers", "clusters"), case)
    expected = {**optimizer, **model["with"].get(case[1], {})}
    skipped = {"optimizer", "note", "norm-ratio-interval"}
    printed = commands.printed(recipe(*case), []).splitlines()
    heads = [f"# on each of {cluster['nodes']} nodes"] if cluster["nodes"] > 1 else []
    assert [line for line in printed if line.startswith("#")] == heads
    for line in printed[len(heads) :]:
        words = shlex.split(line)
        count = len(cluster["environment"])
        assert words[:count] == [f"{name}={value}" for name, value in cluster["environment"].items()]
        script = next(place for place, word in enumerate(words) if word.endswith(model["script"]))
        launcher, flags = flags_of(words[count:script]), flags_of(words[script + 1 :])
        assert launcher["--nproc-per-node"] == str(cluster["gpus-per-node"])
        assert ("--standalone" in launcher) == (cluster["nodes"] == 1)
        assert flags["--optimizer"] == expected["optimizer"]
        rates = {key: float(flags[f"--{key}"] or "nan") for key in expected.keys() - skipped}
        assert rates == {key: float(expected[key]) for key in rates}
        for key in ("num-layers", "hidden-size", "seq-length", "train-iters"):
            assert flags[f"--{key}"] == str(expected.get(key, model[key]))
        assert ("--norm-ratio-interval" in flags) == (case[1] in PAPER or case[0].startswith("tiny"))
        for switch in ("bf16", "use-distributed-optimizer"):
            assert (f"--{switch}" in flags) == cluster[switch]
        assert flags["--save"] == flags["--load"]
        assert str(flags["--save"]).endswith(f"runs/{'-'.join(case)}/checkpoints")
