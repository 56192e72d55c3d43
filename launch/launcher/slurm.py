"""The Slurm script of a recipe: options of sbatch, srun and a container, and the checks of their values."""

import math
import os
import re
import shlex
import string
from pathlib import Path

from megatron_lion.config import LionError, check_choice

from . import commands
from .recipe_files import ROOT
from .recipes import SLURM_PORTS, SLURM_WARNING, Recipe

TEMPLATE = ROOT / "launch" / "slurm.sh.template"
# The nodes meet on the first one, at a port that depends on the job, since jobs may share nodes.
MEETING = """hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
host="${{hosts%%$'\\n'*}}"
port=$(({port} + SLURM_JOB_ID % {ports}))"""
CONTAINERS = ("pyxis", "apptainer")
IMAGE_FILES = (".sqsh", ".sif")
PLAIN = r"[A-Za-z0-9_.:,-]+"
CONSTRAINT = r"[A-Za-z0-9_.:,&|()\[\]*@-]+"
MOUNT = r"/[^:,]*(:/[^:,]*(:[^:,]+)?)?"
# Options that the script sets itself, and the key to use instead; without a key they cannot be changed.
SBATCH_OPTIONS = {
    "--nodes": "nodes", "-N": "nodes", "--cpus-per-task": "slurm-cpus", "-c": "slurm-cpus", "--time": "slurm-time",
    "-t": "slurm-time", "--partition": "slurm-partition", "-p": "slurm-partition", "--account": "slurm-account",
    "-A": "slurm-account", "--qos": "slurm-qos", "-q": "slurm-qos", "--constraint": "slurm-constraint",
    "-C": "slurm-constraint", "--exclusive": "slurm-exclusive", "--gpus-per-node": "gpus-per-node", "--output": "run",
    "-o": "run", "--ntasks-per-node": "", "--signal": "", "--requeue": "", "--open-mode": "",
}  # fmt: skip
SRUN_OPTIONS = {
    "--cpus-per-task": "slurm-cpus", "-c": "slurm-cpus", "--container-image": "container-image",
    "--container-mounts": "container-mounts", "--container-workdir": "container-workdir", "--kill-on-bad-exit": "",
}  # fmt: skip
FILE_KEYS = (
    "train-data-path", "valid-data-path", "test-data-path", "tokenizer-model", "vocab-file", "merge-file",
    "data-cache-path",
)  # fmt: skip


def check(recipe: Recipe) -> None:
    """Raise LionError for a value that a Slurm job cannot have."""
    if "slurm-time" in recipe.settings and seconds(recipe["slurm-time"]) <= SLURM_WARNING:
        raise LionError(
            f"slurm-time {recipe['slurm-time']} is not more than the {SLURM_WARNING} seconds before its end at which a "
            "job is told to save and end, so each job would end at its first step: use more"
        )
    for key in ("partition", "account", "time", "qos"):
        _check_text(recipe, f"slurm-{key}", PLAIN, "letters, digits and -_.:,")
    _check_text(recipe, "slurm-constraint", CONSTRAINT, "letters, digits and -_.:,&|()[]*@")
    _words(recipe, "slurm-sbatch-args", SBATCH_OPTIONS)
    _words(recipe, "slurm-srun-args", SRUN_OPTIONS)
    _words(recipe, "container-args", {})
    if not recipe.get("slurm-python", "python3"):
        raise LionError("slurm-python is empty: use python3, or the path of a Python")
    _check_container(recipe)


def _check_text(recipe: Recipe, key: str, pattern: str, allowed: str) -> None:
    value = recipe.get(key)
    if value is not None and not re.fullmatch(pattern, value):
        option = key.removeprefix("slurm-")
        raise LionError(f"{key} {value!r} is not valid for sbatch's --{option}: use only {allowed}")


def _check_container(recipe: Recipe) -> None:
    companions = [key for key in recipe.settings if key.startswith("container-")]
    if "container" not in recipe.settings:
        if companions:
            raise LionError(f"{companions[0]} has no effect without container: set container to pyxis or apptainer")
        return
    check_choice("container", recipe["container"], CONTAINERS)
    if not recipe.get("container-image"):
        raise LionError(
            f"container {recipe['container']} needs container-image: a file (.sqsh for pyxis, .sif for apptainer), or "
            "an image of a registry (nvcr.io#nvidia/pytorch:TAG for pyxis, docker://nvcr.io/nvidia/pytorch:TAG for "
            "apptainer)"
        )
    _check_image(recipe["container"], recipe["container-image"])
    for mount in _given_mounts(recipe):
        if not re.fullmatch(MOUNT, mount):
            raise LionError(
                f"container-mounts {recipe['container-mounts']!r}: {mount!r} is not a mount. Use SOURCE:TARGET or "
                "SOURCE:TARGET:OPTIONS with absolute paths, separated by commas"
            )
    targets = [target for _, target in _mounted(recipe)]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise LionError(f"container-mounts {recipe['container-mounts']!r} has two mounts on {twice[0]}: remove one")
    if not recipe.get("container-workdir", "/").startswith("/"):
        raise LionError(f"container-workdir {recipe['container-workdir']!r} is not absolute: start it with /")


def _check_image(container: str, image: str) -> None:
    """Raise LionError for an image of a registry in the form of another tool."""
    registry, _, name = image.partition("/")
    if _is_file(image) or not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", registry) or not name:
        return
    right = f"{registry}#{name}" if container == "pyxis" else f"docker://{image}"
    raise LionError(f"container-image {image!r} is not in the form that {container} takes: use {right}, or a file")


def _is_file(image: str) -> bool:
    """Whether ``image`` is a file, or an Apptainer folder, not an image of a registry."""
    return image.endswith(IMAGE_FILES) or os.path.exists(os.path.expanduser(image))


def _words(recipe: Recipe, key: str, taken: dict[str, str]) -> list[str]:
    """The options in the text ``key``, split as a shell does. Raises LionError for those in ``taken``."""
    text = recipe.get(key, "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise LionError(f"{key} {text!r} cannot be split into words: {error}") from None
    if words and not words[0].startswith("-"):
        raise LionError(f"{key} {text!r} does not start with an option: use --OPTION=VALUE, separated by blanks")
    for word in words:
        option = word.partition("=")[0]
        if option in taken:
            instead = f"set {taken[option]} instead" if taken[option] else "remove it"
            raise LionError(f"{key} has {option}, which the script sets itself: {instead}")
    return words


def seconds(text: str) -> float:
    """A time limit of sbatch in seconds.

    It is minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds;
    0 and UNLIMITED mean no limit. Raises LionError for anything else.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if text.upper() in ("INFINITE", "UNLIMITED"):
        return math.inf
    if not found:
        raise LionError(f"slurm-time {text!r} is not a Slurm time limit: use one like 2-00:00:00 or 12:30:00")
    numbers = [int(number) for number in found.groups()[1:] if number is not None]
    units = (60, 1) if found[1] is None and len(numbers) < 3 else (3600, 60, 1)
    total = 86400 * int(found[1] or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    return total or math.inf


def script(recipe: Recipe, extra: list[str], python: str) -> str:
    """The batch script. It runs in the current folder, so relative paths in ``extra`` keep their meaning.

    ``python`` is this machine's, for jobs without a container that set no slurm-python. Every value is quoted, for
    sbatch or for the shell; only ``slurm-setup`` is shell as given. Raises LionError for a name or path that cannot be
    written in a script: line breaks and backslashes, or commas and colons in a path that a container mounts.
    """
    run = Path(recipe["run"])
    python = recipe.get("slurm-python", "python3" if "container" in recipe.settings else python)
    line = commands.torchrun(recipe, extra, [python, "-m", "torch.distributed.run"], host="HOST")
    words = [shlex.quote(word) for word in line]
    if recipe["nodes"] > 1:
        words[line.index("--rdzv-endpoint") + 1] = '"$host:$port"'  # known only inside the job
    cpus = recipe.get("slurm-cpus", recipe["gpus-per-node"] * (1 + recipe.get("num-workers", 2)))
    srun, prefix = _container(recipe)
    srun = [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", *_words(recipe, "slurm-srun-args", {}), *srun]
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=_for_sbatch("the recipe's name", "-".join(recipe.names)),
        nodes=recipe["nodes"],
        warning=SLURM_WARNING,
        cpus=cpus,
        options="\n".join(f"#SBATCH {option}" for option in _sbatch_options(recipe)),
        # In the name of a log, sbatch replaces %j and the like, and %% by %.
        log=_for_sbatch("run", str(run / "log.txt").replace("%", "%%")),
        meeting=MEETING.format(port=commands.port(recipe), ports=SLURM_PORTS) if recipe["nodes"] > 1 else "",
        environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in recipe.environment.items()),
        setup=recipe.get("slurm-setup", ""),
        folder=shlex.quote(str(Path.cwd())),
        command=" ".join([shlex.join([*srun, *prefix]), *words]),
        iterations=recipe["train-iters"],
        marker=shlex.quote(str(recipe.tracker)),
        exit_interval=recipe.get("exit-interval", 0),
        resumes=str(recipe.paths["load"] == recipe.paths["save"]).lower(),
    )


def _sbatch_options(recipe: Recipe) -> list[str]:
    names = ("partition", "account", "qos", "constraint", "time")
    values = {name: recipe[f"slurm-{name}"] for name in names if f"slurm-{name}" in recipe.settings}
    if recipe["device"] == "cuda":
        values["gpus-per-node"] = str(recipe["gpus-per-node"])
    options = [f"--{name}={_for_sbatch(f'slurm-{name}', value)}" for name, value in values.items()]
    if recipe.get("slurm-exclusive"):
        options.append("--exclusive")
    more = [_for_sbatch("slurm-sbatch-args", word) for word in _words(recipe, "slurm-sbatch-args", {})]
    return [*options, " ".join(more)] if more else options


def _container(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Options of srun, and the words before the command, that run it in the recipe's container.

    ``env`` sets the variables inside: those of an image may replace the job's.
    """
    if "container" not in recipe.settings:
        return [], []
    environment = ["env", *(f"{name}={value}" for name, value in recipe.environment.items())]
    image, mounts = recipe["container-image"], ",".join(_mounts(recipe))
    if _is_file(image):  # pyxis takes a path for an image of a registry unless it starts with / or ./
        image = str(Path.cwd() / os.path.expanduser(image))
    workdir, more = recipe.get("container-workdir", str(Path.cwd())), _words(recipe, "container-args", {})
    if recipe["container"] == "pyxis":
        options = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={workdir}"]
        return [*options, *more], environment
    gpus = ["--nv"] if recipe["device"] == "cuda" else []
    return [], ["apptainer", "exec", *gpus, "--bind", mounts, "--pwd", workdir, *more, image, *environment]


def _given_mounts(recipe: Recipe) -> list[str]:
    return [mount.strip() for mount in recipe.get("container-mounts", "").split(",") if mount.strip()]


def _mounts(recipe: Recipe) -> list[str]:
    """The recipe's mounts, then those that its paths need: each has the same path inside and outside.

    A folder of data in the target of a mount is already in the container. The others are folders of this machine,
    which need a mount also inside such a target, but no second one on it.
    """
    given = _mounted(recipe)
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in _given_mounts(recipe)]
    same = [source for source, target in given if source == target]
    files = {Path(recipe[key]).parent for key in FILE_KEYS if recipe.get(key)} | set(_reports(recipe).values())
    files |= {Path(recipe["load"])} if "load" in recipe.settings else set()
    files = {path for path in files if not _is_inside(recipe, path)}
    own = {ROOT, Path.cwd(), *(Path(recipe[key]) for key in ("run", "save") if key in recipe.settings)}
    own -= {target for _, target in given}
    for path in sorted(files | own):
        if not any(path.is_relative_to(mounted) for mounted in same):
            if re.search("[:,]", str(path)):
                raise LionError(f"{path} cannot be mounted in a container: rename it without commas and colons")
            same.append(path)
            mounts.append(f"{path}:{path}")
    return mounts


def _is_inside(recipe: Recipe, path: Path) -> bool:
    """Whether ``path`` is in the target of one of the recipe's mounts."""
    return any(path.is_relative_to(target) for _, target in _mounted(recipe))


def _reports(recipe: Recipe) -> dict[str, Path]:
    """The folders of what the run reports, by key, if the recipe sets them."""
    found = {"tensorboard-dir": Path(recipe["tensorboard-dir"])} if recipe.get("tensorboard-dir") else {}
    if recipe.has_rounds and recipe.get("norm-ratio-file"):
        found["norm-ratio-file"] = Path(recipe["norm-ratio-file"]).parent
    return found


def folders_to_make(recipe: Recipe) -> dict[str, Path]:
    """Folders besides ``run`` and ``save`` that must exist before the job, by key, because its container mounts them.

    Without a container the job makes them itself.
    """
    if "container" not in recipe.settings:
        return {}
    return {key: path for key, path in _reports(recipe).items() if not _is_inside(recipe, path)}


def _mounted(recipe: Recipe) -> list[tuple[Path, Path]]:
    """Source and target of each of the recipe's mounts; none without a container."""
    if "container" not in recipe.settings:
        return []
    pairs = [(mount.split(":") * 2)[:2] for mount in _given_mounts(recipe)]
    return [(Path(source), Path(target)) for source, target in pairs]


def places(recipe: Recipe, path: str) -> list[Path]:
    """Where this machine may have the recipe's file ``path``: there, and in the sources of the container's mounts."""
    mounted = [pair for pair in _mounted(recipe) if Path(path).is_relative_to(pair[1])]
    return [Path(path), *(source / Path(path).relative_to(target) for source, target in mounted)]


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
