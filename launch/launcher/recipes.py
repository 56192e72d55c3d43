"""Recipes: a model, an optimizer and a cluster file make one table of settings, with overrides, every key checked."""

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration.cpu import run_flags

from . import recipe_files
from .keys import PATH_KEYS, typed
from .recipe_files import KINDS, Table

SLURM_WARNING = 600  # seconds before its time limit at which a Slurm job is told to save and end
SLURM_PORTS = 1000  # the nodes of a Slurm job meet at master-port plus the job's number modulo this


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe: its settings, where each comes from, and the environment of its processes."""

    names: tuple[str, str, str]
    settings: dict[str, Any]
    environment: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    """by key: the file, and what its comment says"""
    notes: tuple[str, ...] = ()
    """notes for the user, from the key ``note`` of the files"""

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    @property
    def ranks(self) -> int:
        """The number of processes, one for each GPU."""
        return int(self["nodes"] * self["gpus-per-node"])

    @property
    def paths(self) -> dict[str, str]:
        """Paths of the run's checkpoints and reports, by key. By default they are in its folder, and it resumes."""
        save = self.get("save", f"{self['run']}/checkpoints")
        return {
            "save": save,
            "load": self.get("load", save),
            "tensorboard-dir": self.get("tensorboard-dir", f"{self['run']}/tensorboard"),
            "norm-ratio-file": self.get("norm-ratio-file", f"{self['run']}/norm_ratio.jsonl"),
        }

    @property
    def has_rounds(self) -> bool:
        """Whether the run measures the norm ratio."""
        return bool(self.get("norm-ratio-interval") or self.get("norm-ratio-at-start"))

    @property
    def tracker(self) -> Path:
        """Megatron's file with the iteration of the run's last checkpoint."""
        return Path(self.paths["save"]) / "latest_checkpointed_iteration.txt"

    @property
    def addresses(self) -> list[str]:
        """The nodes' addresses if they are set, in the order of the nodes."""
        return str(self.get("node-addresses", "")).replace(" ", "").split(",") if self.get("node-addresses") else []

    @property
    def layout(self) -> dict[str, int]:
        """TP, PP and CP; absent ones are 1."""
        flags = {
            "TP": "tensor-model-parallel-size",
            "PP": "pipeline-model-parallel-size",
            "CP": "context-parallel-size",
        }
        return {short: int(self.get(key, 1)) for short, key in flags.items()}

    @property
    def dp(self) -> int:
        """Data-parallel replicas."""
        layout = self.layout
        return self.ranks // (layout["TP"] * layout["PP"] * layout["CP"])


class _Settings:
    """Collects settings. A later value replaces an earlier one, and its source records that."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        self.notes: list[str] = []

    def add_file(self, path: Path, kind: str, table: Table) -> None:
        """The keys of one file. Raises LionError if another file has set one of them."""
        for key in table:
            if key in self.files and key != "note":
                raise LionError(f"{key} is set in both {self.files[key]} and {path}; keep one")
            self.files[key] = path
        self.add(table, f"in {path}", kind)

    def add(self, table: Table, where: str, source: str) -> None:
        """Each key of ``table`` with its comment; ``where`` is for error messages."""
        for key, value in table.items():
            if key == "note":
                self.notes.append(" ".join(str(value).split()))
            else:
                comment = table.comments.get(key, "")
                self.replace(key, typed(key, value, where), f"{source}: {comment}" if comment else source)

    def replace(self, key: str, value: Any, source: str) -> None:
        if key in self.values and self.values[key] != value:
            source += f" (instead of {self.values[key]})"
        self.values[key], self.sources[key] = value, source


def resolve(model: str, optimizer: str, cluster: str, overrides: list[str]) -> Recipe:
    """Read the three files, apply the model's ``with`` section for the optimizer, then ``key=value`` overrides.

    Each name is that of a file in configs/ without its suffix, or a path of your own ending in .yaml. Paths in the
    recipe become absolute: relative ones start from the current folder, ~ is the home folder. ``device=cpu`` as an
    override also sets the flags and variables that a run without a GPU needs. Raises LionError for an unknown name,
    key or kind of value, and for a key that is set twice.
    """
    read = [recipe_files.read(kind, name) for kind, name in zip(KINDS, (model, optimizer, cluster), strict=True)]
    names = tuple(path.stem for path, _ in read)
    environment: dict[str, str] = {}
    settings = _Settings()
    for kind, (path, content) in zip(KINDS, read, strict=True):
        environment |= recipe_files.environment(content.pop("environment", Table({}, {})), path)
        if kind == "models":
            own = _checked_with(content.pop("with", Table({}, {})), path)
        settings.add_file(path, kind[:-1], content)
    if names[1] in own:
        settings.add(own[names[1]], f"in {read[0][0]} with {names[1]}", f"model, with {names[1]}")
    given = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise LionError(f"{override!r} is not key=value, for example lr=2e-5")
        settings.replace(key, typed(key, text, "on the command line"), "command line")
        given.add(key)
    if "device" in given and settings.values["device"] == "cpu":
        _move_to_cpu(settings, environment, given)
    settings.values.setdefault("run", f"runs/{'-'.join(names)}")
    return Recipe(
        names=names,  # type: ignore[arg-type]
        settings={key: _expanded(settings.values, key) for key in settings.values},
        environment=environment,
        sources=settings.sources,
        notes=tuple(settings.notes),
    )


def _move_to_cpu(settings: _Settings, environment: dict[str, str], given: set[str]) -> None:
    """Set, in place, what a run without a GPU needs, except for the keys that are ``given`` on the command line."""
    words = [*run_flags.FLAGS.split(), "--"]
    for word, following in itertools.pairwise(words):
        key = word.removeprefix("--")
        if word.startswith("--") and key not in given:
            value = "true" if following.startswith("--") else following
            settings.replace(key, typed(key, value, "for the CPU"), "device=cpu")
    environment |= run_flags.ENVIRONMENT


def _checked_with(content: Any, path: Path) -> dict[str, Table]:
    """A model's ``with`` section: its settings for each optimizer. Those of other optimizers are checked, too."""
    sections = {
        optimizer: recipe_files.as_table(own, f"with: {optimizer} in {path}")
        for optimizer, own in recipe_files.as_table(content, f"with in {path}").items()
    }
    for optimizer, own in sections.items():
        _Settings().add(own, f"in {path} with {optimizer}", "")
    return sections


def _expanded(settings: dict[str, Any], key: str, inside: tuple[str, ...] = ()) -> Any:
    """The setting ``key``, with {data} and {run} replaced and a path made absolute. Other braces stay as they are.

    ``inside`` names the settings that are being expanded, to find one that names itself.
    """
    if key not in settings or key in inside:
        problem = "names itself" if key in inside else "is not set"
        raise LionError(f"{inside[-1]}: {settings[inside[-1]]!r} names {{{key}}}, which {problem}: write the path out")
    value = settings[key]
    if not isinstance(value, str):
        return value
    # ${data} is the shell's.
    value = re.sub(r"(?<!\$)\{(data|run)\}", lambda name: _expanded(settings, name[1], (*inside, key)), value)
    return str(Path.cwd() / os.path.expanduser(value)) if key in PATH_KEYS and value else value
