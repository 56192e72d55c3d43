"""From a recipe to command lines: torchrun on each node, and the Slurm script."""

import json
import re
import shlex
import string
from pathlib import Path

from megatron_lion.config import LionError

from .recipes import MEGATRON_KEYS, ROOT, SLURM_PORTS, SLURM_WARNING, Recipe

SLURM_TEMPLATE = ROOT / "launch" / "slurm.sh.template"
JOIN_TIMEOUT = 600  # torchrun's own, in seconds
START_SECONDS = 120  # for torchrun and the ranks to start before and after they wait for the other nodes
# Where the nodes of a Slurm job meet: on the first one, at a port of the job's, since jobs may share nodes.
MEETING = """hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
host="${{hosts%%$'\\n'*}}"
port=$(({port} + SLURM_JOB_ID % {ports}))"""
HOST = "MASTER_ADDRESS"  # what the reader of --print puts in


def training_flags(recipe: Recipe, extra: list[str]) -> list[str]:
    """Megatron's flags: every setting that is one, and where the run keeps its files; then ``extra``, as given."""
    run = Path(recipe["run"])
    places = {
        "save": str(run / "checkpoints"),
        "load": str(run / "checkpoints"),
        "tensorboard-dir": str(run / "tensorboard"),
        "norm-ratio-file": str(run / "norm_ratio.jsonl"),
    }
    settings = places | recipe.settings
    if not recipe.get("norm-ratio-interval"):  # its companions are refused without it
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
    """The words of the line that starts the ranks of ``node``. ``host`` is the first node's name, under Slurm.

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


def _port(recipe: Recipe) -> int:
    return int(recipe.get("master-port", 29500))


def _join_timeout(recipe: Recipe) -> int:
    return int(recipe.get("join-timeout", JOIN_TIMEOUT))


def _rendezvous(recipe: Recipe, host: str | None, node: int) -> list[str]:
    """Torchrun's flags for where the nodes meet. One node meets nobody: a free port, so that runs can share it."""
    if recipe["nodes"] == 1:
        return ["--standalone"]
    first = host or recipe.get("master-address") or (recipe.addresses or [HOST])[0]
    endpoint = f"{first}:{_port(recipe)}"
    words = ["--nnodes", str(recipe["nodes"]), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    words += ["--rdzv-id", Path(recipe["run"]).name]
    settings = f"join_timeout={_join_timeout(recipe)}"
    if recipe.addresses and host is None:
        # torchrun finds out whether it is the host by its name's addresses alone, which may be the loopback's.
        words += ["--local-addr", recipe.addresses[node]]
        settings += f",is_host={node == 0}".lower()
    return [*words, "--rdzv-conf", settings]


def printed(recipe: Recipe, extra: list[str]) -> str:
    """The plain lines, one for each node, with the environment before each."""
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in recipe.environment.items())
    lines = [
        " ".join(filter(None, [environment, shlex.join(torchrun(recipe, extra, ["torchrun"], node=node))]))
        for node in range(recipe["nodes"])
    ]
    if recipe["nodes"] == 1:
        return lines[0]
    return "\n".join(f"# node {node} of {recipe['nodes']}\n{line}" for node, line in enumerate(lines))


def slurm_script(recipe: Recipe, extra: list[str], python: str) -> str:
    """The batch script, which runs where this process does: a relative path in ``extra`` is what it is here.

    Every value is quoted, for sbatch or for the shell; only ``slurm-setup`` is shell as given. Raises LionError for a
    value that sbatch cannot be given: line breaks and backslashes in the run's folder or the recipe's names, anything
    but letters, digits and -_.:, in sbatch's own options.
    """
    options = {"partition": recipe.get("slurm-partition"), "account": recipe.get("slurm-account")}
    options["time"] = recipe.get("slurm-time")
    if recipe["device"] == "cuda":
        options["gpus-per-node"] = str(recipe["gpus-per-node"])
    for key, value in options.items():
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_.:,-]+", value):
            raise LionError(
                f"slurm-{key} {value!r} is not valid for sbatch's --{key}: use only letters, digits and -_.:,"
            )
    run = Path(recipe["run"])
    line = torchrun(recipe, extra, [python, "-m", "torch.distributed.run"], host="HOST")
    words = [shlex.quote(word) for word in line]
    if recipe["nodes"] > 1:
        words[line.index("--rdzv-endpoint") + 1] = '"$host:$port"'  # known only inside the job
    return string.Template(SLURM_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=_for_sbatch("the recipe's name", "-".join(recipe.names)),
        nodes=recipe["nodes"],
        warning=SLURM_WARNING,
        cpus=recipe.get("slurm-cpus", recipe["gpus-per-node"] * (1 + recipe.get("num-workers", 2))),
        options="\n".join(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None),
        # In the name of a log, sbatch replaces %j and the like, and %% by %.
        log=_for_sbatch("run", str(run / "log.txt").replace("%", "%%")),
        meeting=MEETING.format(port=_port(recipe), ports=SLURM_PORTS) if recipe["nodes"] > 1 else "",
        environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in recipe.environment.items()),
        setup=recipe.get("slurm-setup", ""),
        folder=shlex.quote(str(Path.cwd())),
        command=" ".join(words),
        iterations=recipe["train-iters"],
        marker=shlex.quote(str(run / "checkpoints" / "latest_checkpointed_iteration.txt")),
    )


def _for_sbatch(what: str, value: str) -> str:
    """``value`` quoted for a ``#SBATCH`` line.

    sbatch reads quotes as the shell does, but a backslash is an escape also between them, and turns off the log's
    patterns; a line break would end the option and start a line of shell.
    """
    if "\\" in value or not value.isprintable():
        raise LionError(
            f"{what} {value!r} cannot be written in a Slurm script: use a name without backslashes, line breaks and "
            "other control characters"
        )
    return shlex.quote(value)


def record(recipe: Recipe, extra: list[str], versions: dict[str, str | None]) -> str:
    """What is saved with the run, as JSON: the resolved recipe, the line, versions and commit."""
    content = {
        "names": dict(zip(("model", "optimizer", "cluster"), recipe.names, strict=True)),
        "settings": recipe.settings,
        "environment": recipe.environment,
        "extra": extra,
        "command": shlex.join(torchrun(recipe, extra, ["torchrun"])),
        "versions": versions,
    }
    return json.dumps(content, indent=2) + "\n"
