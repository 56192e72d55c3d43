"""Recipes: a model, an optimizer and a cluster file make one table of settings, with overrides, every key checked."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_lion.config import LionError, did_you_mean

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
KINDS = ("models", "optimizers", "clusters")

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
    ), int),
    **dict.fromkeys((
        "hidden-dropout", "attention-dropout", "init-method-std", "clip-grad", "mask-prob", "short-seq-prob", "lr",
        "min-lr", "lion-beta1", "lion-beta2", "sgd-momentum", "adam-beta1", "adam-beta2", "adam-eps", "weight-decay",
    ), float),
    **dict.fromkeys((
        "optimizer", "lr-decay-style", "train-data-path", "valid-data-path", "test-data-path", "data-cache-path",
        "tokenizer-type", "tokenizer-model", "vocab-file", "merge-file", "transformer-impl", "attention-backend",
        "recompute-granularity", "distributed-backend", "save", "load", "tensorboard-dir", "norm-ratio-file",
        "lion-momentum-dtype", "lion-master-weights",
    ), str),
    **dict.fromkeys((
        "bf16", "fp16", "untie-embeddings-and-output-weights", "sequence-parallel", "use-distributed-optimizer",
        "overlap-grad-reduce", "overlap-param-gather", "exit-signal-handler", "log-throughput", "norm-ratio-at-start",
        "grad-reduce-in-bf16",
        "no-gradient-accumulation-fusion", "no-rope-fusion", "no-persist-layer-norm", "no-masked-softmax-fusion",
    ), bool),
}  # fmt: skip
KEYS = LAUNCH_KEYS | MEGATRON_KEYS
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

    Each name is that of a file in configs/ without its suffix, or a path of your own ending in .yaml. Raises LionError
    for an unknown name, key or kind of value, and for a key that two files set.
    """
    read = [_read(kind, name) for kind, name in zip(KINDS, (model, optimizer, cluster), strict=True)]
    names = tuple(path.stem for path, _ in read)
    settings: dict[str, Any] = {}
    environment: dict[str, str] = {}
    origin: dict[str, Path] = {}
    for kind, (path, content) in zip(KINDS, read, strict=True):
        environment |= _environment(content.pop("environment", {}), path)
        own = content.pop("with", {}) if kind == "models" else {}
        for key, value in content.items():
            if key in origin:
                raise LionError(f"{key} stands in {origin[key]} and in {path}: leave it in one of them")
            origin[key] = path
            settings[key] = _typed(key, value, f"in {path}")
        if kind == "models":
            chosen, chosen_path = own.get(names[1], {}), path
    settings |= {key: _typed(key, value, f"in {chosen_path} with {names[1]}") for key, value in chosen.items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise LionError(f"{override!r} is not key=value, for example lr=2e-5")
        settings[key] = _typed(key, _parsed(text, KEYS.get(key, str)), "on the command line")
    settings.setdefault("run", f"runs/{'-'.join(names)}")
    return Recipe(names=names, settings=_substituted(settings), environment=environment)  # type: ignore[arg-type]


def _read(kind: str, name: str) -> tuple[Path, dict[str, Any]]:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise LionError(f"{kind[:-1]} file {name} does not exist: give a YAML file, or one of {known(kind)}")
    else:
        path = CONFIGS / kind / f"{name}.yaml"
        if not path.is_file():
            raise LionError(f"{name!r} is no {kind[:-1]}: {did_you_mean(name, known(kind).split(', '))}")
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LionError(f"{shown} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise LionError(f"{shown} must hold one table of key: value lines, got {type(content).__name__}")
    return shown, content


def _environment(variables: dict[Any, Any], path: Path) -> dict[str, str]:
    """The processes' environment; its names are written into shell lines as they are, so they must be names there."""
    for name in variables:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise LionError(
                f"environment {name!r} in {path} is not the name of a variable: use letters, digits and _, and no "
                "digit first"
            )
    return {str(name): str(value) for name, value in variables.items()}


def known(kind: str) -> str:
    """The names of the files of a kind, in one line."""
    return ", ".join(sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml")))


def _parsed(text: str, expected: type) -> Any:
    """What ``text`` says for a key of that type; the text itself where it says nothing of the kind."""
    if expected is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return int(text) if expected is int and re.fullmatch(r"[+-]?\d+", text) else text


def _typed(key: str, value: Any, where: str) -> Any:
    """``value`` as the type that ``key`` has; YAML reads 1e-5 as a text, which a number's key turns into a number."""
    if key not in KEYS:
        raise LionError(
            f"{key!r} {where} is no key of a recipe: {did_you_mean(key, KEYS)}. Other flags of Megatron's go after --"
        )
    expected = KEYS[key]
    if expected is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    elif expected is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise LionError(f"{key} {where} must be {TYPE_NAMES[expected]}, got {value!r}")


def _substituted(settings: dict[str, Any]) -> dict[str, Any]:
    """Put the settings ``data`` and ``run`` into the texts that name them as {data} and {run}."""
    found = dict(settings)
    for key, value in settings.items():
        for name in re.findall(r"\{([^}]*)\}", value) if isinstance(value, str) else ():
            if name not in ("data", "run") or name not in settings:
                raise LionError(
                    f"{key}: {value!r} names {{{name}}}; {{data}} and {{run}} can be named, where they are set"
                )
            found[key] = found[key].replace(f"{{{name}}}", str(settings[name]))
    return found
