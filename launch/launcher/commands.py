"""Build the torchrun command of each node from a recipe."""

import json
import shlex
from pathlib import Path

from .keys import MEGATRON_KEYS
from .recipe_files import ROOT
from .recipes import Recipe

JOIN_TIMEOUT = 600  # torchrun's own, in seconds
START_SECONDS = 120  # for torchrun and the ranks to start, in addition to the rendezvous
HOST = "MASTER_ADDRESS"  # the reader of --print replaces it


def training_flags(recipe: Recipe, extra: list[str]) -> list[str]:
    """Megatron's flags: the settings that are flags, the paths of the run's files, then ``extra`` as given."""
    settings = recipe.settings | recipe.paths
    if not recipe.has_rounds:  # the other norm-ratio flags are refused
        settings = {key: value for key, value in settings.items() if not key.startswith("norm-ratio")}
    words: list[str] = []
    for key in MEGATRON_KEYS:
        value = settings.get(key)
        if value is None or value is False:
            continue
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words + extra


def torchrun(
    recipe: Recipe, extra: list[str], launcher: list[str], *, host: str | None = None, node: int = 0
) -> list[str]:
    """The words of the command that starts the ranks of ``node``. Under Slurm ``host`` is the first node's name.

    ``launcher`` is torchrun, or a Python and its -m. With several nodes ``kill_hung_launcher.py`` ends one that hangs.
    """
    line = [*launcher, "--nproc-per-node", str(recipe["gpus-per-node"])]
    line += ["--max-restarts", str(recipe.get("max-restarts", 0))]
    line += _rendezvous(recipe, host, node)
    if recipe["nodes"] > 1:
        python = launcher[0] if len(launcher) > 1 else "python3"
        seconds = _join_timeout(recipe) + START_SECONDS
        line = [python, str(ROOT / "launch" / "kill_hung_launcher.py"), str(seconds), *line]
    return [*line, str(ROOT / "launch" / recipe["script"]), *training_flags(recipe, extra)]


def port(recipe: Recipe) -> int:
    """The port at which several nodes meet."""
    return int(recipe.get("master-port", 29500))


def _join_timeout(recipe: Recipe) -> int:
    return int(recipe.get("join-timeout", JOIN_TIMEOUT))


def _rendezvous(recipe: Recipe, host: str | None, node: int) -> list[str]:
    """Torchrun's flags for where the nodes meet. One node uses any free port, so that runs can share it."""
    if recipe["nodes"] == 1:
        return ["--standalone"]
    first = host or recipe.get("master-address") or (recipe.addresses or [HOST])[0]
    endpoint = f"{first}:{port(recipe)}"
    words = ["--nnodes", str(recipe["nodes"]), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    words += ["--rdzv-id", Path(recipe["run"]).name]
    settings = f"join_timeout={_join_timeout(recipe)}"
    if recipe.addresses and host is None:
        # By default torchrun looks up the addresses of its own name, which may be the loopback, to see if it is the
        # host.
        words += ["--local-addr", recipe.addresses[node]]
        settings += f",is_host={node == 0}".lower()
    return [*words, "--rdzv-conf", settings]


def printed(recipe: Recipe, extra: list[str]) -> str:
    """The command of each node, after its environment variables. Printed once if all nodes have the same."""
    environment = [f"{name}={shlex.quote(value)}" for name, value in recipe.environment.items()]
    lines = [
        " ".join([*environment, shlex.join(torchrun(recipe, extra, ["torchrun"], node=node))])
        for node in range(recipe["nodes"])
    ]
    if len(lines) == 1:
        return lines[0]
    if len(set(lines)) == 1:
        return f"# on each of {len(lines)} nodes\n{lines[0]}"
    return "\n".join(f"# node {node} of {len(lines)}\n{line}" for node, line in enumerate(lines))


def record(recipe: Recipe, extra: list[str], versions: dict[str, str | None]) -> str:
    """The JSON that is saved with the run: the resolved recipe, its command, versions and commit."""
    content = {
        "names": dict(zip(("model", "optimizer", "cluster"), recipe.names, strict=True)),
        "settings": recipe.settings,
        "environment": recipe.environment,
        "extra": extra,
        "command": shlex.join(torchrun(recipe, extra, ["torchrun"])),
        "versions": versions,
    }
    return json.dumps(content, indent=2) + "\n"
