"""Recipes: a model, an optimizer and a cluster file make one table of settings, with overrides, every key checked."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_lion.config import LionError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
KINDS = ("models", "optimizers", "clusters")
SLURM_WARNING = 600  # seconds before its time limit at which a Slurm job is told to save and end
SLURM_PORTS = 1000  # a Slurm job's nodes meet at one of so many ports from master-port on, by the job's number

# What launch.py itself reads. Everything else is a flag of Megatron's, without its dashes.
LAUNCH_KEYS: dict[str, type] = {
    "script": str,
    "data": str,
    "run": str,
    "vocab-size": int,  # for the estimates: Megatron asks the tokenizer
    "nodes": int,
    "gpus-per-node": int,
    "device": str,
    "gpu-memory-gib": float,
    "gpu-peak-tflops": float,
    "gpu-link-gbps": float,  # to other nodes, or inside the only one; Gb/s in one direction
    "max-restarts": int,
    "join-timeout": int,  # seconds that a node waits for the others, 600 where nothing is said
    "master-address": str,
    "master-port": int,
    "node-addresses": str,  # one for each node, commas between
    "slurm-time": str,
    "slurm-cpus": int,  # on each node; one for each rank and each of its data workers where nothing is said
    "slurm-partition": str,
    "slurm-account": str,
    "slurm-setup": str,
}
MEGATRON_KEYS: dict[str, type] = {
    **dict.fromkeys((
        "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "seq-length",
        "max-position-embeddings", "global-batch-size", "micro-batch-size", "train-iters", "lr-decay-iters",
        "lr-warmup-iters", "seed", "make-vocab-size-divisible-by", "log-interval", "eval-interval", "eval-iters",
        "save-interval", "exit-interval", "norm-ratio-interval", "norm-ratio-batches", "tensor-model-parallel-size",
        "pipeline-model-parallel-size", "context-parallel-size", "distributed-timeout-minutes", "num-workers",
        "lion-gather-refresh",
    ), int),
    **dict.fromkeys((
        "hidden-dropout", "attention-dropout", "init-method-std", "clip-grad", "mask-prob", "short-seq-prob", "lr",
        "min-lr", "lion-beta1", "lion-beta2", "sgd-momentum", "adam-beta1", "adam-beta2", "adam-eps", "weight-decay",
    ), float),
    **dict.fromkeys((
        "optimizer", "lr-decay-style", "train-data-path", "valid-data-path", "test-data-path", "data-cache-path",
        "tokenizer-type", "tokenizer-model", "vocab-file", "merge-file", "transformer-impl", "attention-backend",
        "recompute-granularity", "distributed-backend", "save", "load", "tensorboard-dir", "norm-ratio-file",
        "lion-momentum-dtype", "lion-master-weights", "lion-gather",
    ), str),
    **dict.fromkeys((
        "bf16", "fp16", "untie-embeddings-and-output-weights", "sequence-parallel", "use-distributed-optimizer",
        "overlap-grad-reduce", "overlap-param-gather", "exit-signal-handler", "log-throughput", "norm-ratio-at-start",
        "grad-reduce-in-bf16",
        "no-gradient-accumulation-fusion", "no-rope-fusion", "no-persist-layer-norm", "no-masked-softmax-fusion",
    ), bool),
}  # fmt: skip
KEYS = LAUNCH_KEYS | MEGATRON_KEYS
PATH_KEYS = (
    "data", "run", "train-data-path", "valid-data-path", "test-data-path", "data-cache-path", "tokenizer-model",
    "vocab-file", "merge-file", "save", "load", "tensorboard-dir", "norm-ratio-file",
)  # fmt: skip
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe: where it comes from, its settings, and the environment of its processes."""

    names: tuple[str, str, str]
    settings: dict[str, Any]
    environment: dict[str, str]

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    @property
    def ranks(self) -> int:
        """The number of processes, one for each GPU."""
        return int(self["nodes"] * self["gpus-per-node"])

    @property
    def addresses(self) -> list[str]:
        """The nodes' addresses where they were given, in the nodes' order."""
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


def resolve(model: str, optimizer: str, cluster: str, overrides: list[str]) -> Recipe:
    """Read the three files, apply the model's ``with`` section for the optimizer, then ``key=value`` overrides.

    Each name is that of a file in configs/ without its suffix, or a path of your own ending in .yaml. Paths in the
    recipe become absolute: relative ones start from the current folder, ~ is the home folder. Raises LionError for an
    unknown name, key or kind of value, and for a key that is set twice.
    """
    read = [_read(kind, name) for kind, name in zip(KINDS, (model, optimizer, cluster), strict=True)]
    names = tuple(path.stem for path, _ in read)
    settings: dict[str, Any] = {}
    environment: dict[str, str] = {}
    origin: dict[str, Path] = {}
    for kind, (path, content) in zip(KINDS, read, strict=True):
        environment |= _environment(content.pop("environment", {}), path)
        if kind == "models":
            own = _own_settings(content.pop("with", {}), path)
        for key, value in content.items():
            if key in origin:
                raise LionError(f"{key} is set in both {origin[key]} and {path}; keep one")
            origin[key] = path
            settings[key] = _typed(key, value, f"in {path}")
    settings |= own.get(names[1], {})
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise LionError(f"{override!r} is not key=value, for example lr=2e-5")
        settings[key] = _typed(key, text, "on the command line")
    settings.setdefault("run", f"runs/{'-'.join(names)}")
    settings = {key: _expanded(settings, key) for key in settings}
    return Recipe(names=names, settings=settings, environment=environment)  # type: ignore[arg-type]


class _TextLoader(yaml.SafeLoader):
    """Every value is the text as written, so that the key decides its type and not YAML 1.1 (12:30:00, on, 0777).

    Only ``<<`` keeps its meaning, and null stays null. A key that a table sets twice is an error.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":merge", ":null"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise LionError(f"{name} is set on line {lines[name]} and on line {line}: keep one of them")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _read(kind: str, name: str) -> tuple[Path, dict[str, Any]]:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise LionError(f"{kind[:-1]} file {name} does not exist: use a YAML file, or one of {known(kind)}")
    else:
        path = CONFIGS / kind / f"{name}.yaml"
        if not path.is_file():
            raise LionError(f"unknown {kind[:-1]} {name!r}: {did_you_mean(name, known(kind).split(', '))}")
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_TextLoader)
    except LionError as error:
        raise LionError(f"{shown}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LionError(f"{shown} cannot be read: {' '.join(str(error).split())}") from error
    return shown, _table(content, str(shown))


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LionError(f"{what} must hold one table of key: value lines, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__} {value!r}"


def _environment(content: Any, path: Path) -> dict[str, str]:
    """The processes' environment: texts as written. Names go into shell lines as they are, so they are names there."""
    table = _table(content, f"environment in {path}")
    for name, value in table.items():
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise LionError(
                f"environment {name!r} in {path} is not the name of a variable: use letters, digits and _, and no "
                "digit first"
            )
        if not isinstance(value, str):
            raise LionError(f'environment in {path}: {name} must be a text, got {_kind(value)}; "" is an empty one')
    return table


def _own_settings(content: Any, path: Path) -> dict[str, dict[str, Any]]:
    """A model's ``with`` section: the settings that it has for each optimizer."""
    return {
        optimizer: {
            key: _typed(key, value, f"in {path} with {optimizer}")
            for key, value in _table(own, f"with: {optimizer} in {path}").items()
        }
        for optimizer, own in _table(content, f"with in {path}").items()
    }


def known(kind: str) -> str:
    """The names of the files of a kind, in one line."""
    return ", ".join(sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml")))


def _typed(key: str, value: Any, where: str) -> Any:
    """What the text ``value`` says for a key of that type. Raises LionError where it says nothing of the kind."""
    if key not in KEYS:
        raise LionError(
            f"unknown key {key!r} {where}: {did_you_mean(key, KEYS)}. Other flags of Megatron's go after --"
        )
    expected = KEYS[key]
    if isinstance(value, str):
        if expected is str:
            return value
        if expected is bool and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
        if expected is float or (expected is int and re.fullmatch(r"[+-]?\d[\d_]*", value)):
            with contextlib.suppress(ValueError):
                return expected(value)
    raise LionError(f"{key} {where} must be {TYPE_NAMES[expected]}, got {value!r}")


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
