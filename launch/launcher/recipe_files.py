"""Read the YAML files of a recipe: each value as text, with the comment on its line."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_lion.config import LionError
from megatron_lion.nearest import did_you_mean

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
KINDS = ("models", "optimizers", "clusters")


class Table(dict[str, Any]):
    """A YAML table, and the comment at the end of each key's line."""

    def __init__(self, content: dict[str, Any], comments: dict[str, str]) -> None:
        super().__init__(content)
        self.comments = comments


class _TextLoader(yaml.SafeLoader):
    """Every value is the text as written. The key, not YAML 1.1, decides its type (12:30:00, on, 0777).

    Only ``<<`` keeps its meaning, and null stays null. A key that a table sets twice is an error.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":merge", ":null"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines = text.splitlines()

    def construct_table(self, node: yaml.MappingNode) -> Table:
        """The table of ``node``, for the tag of YAML's maps."""
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first_lines:
                raise LionError(f"{name} is set on line {first_lines[name]} and on line {line}: keep one of them")
            first_lines[name] = line
        content = self.construct_mapping(node, deep=True)
        return Table(content, {str(key.value): self._comment(value) for key, value in node.value})

    def _comment(self, value: yaml.Node) -> str:
        end = value.end_mark
        rest = self.lines[end.line][end.column :] if end.line < len(self.lines) else ""
        found = re.search(r"(?:^|\s)#\s*(.*)$", rest)
        return found[1].strip() if found else ""


_TextLoader.add_constructor("tag:yaml.org,2002:map", _TextLoader.construct_table)


def known(kind: str) -> str:
    """The names of the files of a kind, in one line."""
    return ", ".join(sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml")))


def read(kind: str, name: str) -> tuple[Path, Table]:
    """The file ``name`` of a kind, or the YAML file at that path. Raises LionError if it has no table."""
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
    return shown, as_table(content, str(shown))


def as_table(value: Any, what: str) -> Table:
    """``value`` if it is a table. Raises LionError naming ``what`` otherwise."""
    if not isinstance(value, Table):
        raise LionError(f"{what} must hold one table of key: value lines, got {_kind(value)}")
    return value


def environment(content: Any, path: Path) -> dict[str, str]:
    """The environment variables as strings. Names are written into shell lines unquoted, so they must be valid."""
    table = as_table(content, f"environment in {path}")
    for name, value in table.items():
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise LionError(
                f"environment {name!r} in {path} is not the name of a variable: use letters, digits and _, and no "
                "digit first"
            )
        if not isinstance(value, str):
            raise LionError(f'environment in {path}: {name} must be a text, got {_kind(value)}; "" is an empty one')
    return dict(table)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"a {'dict' if isinstance(value, Table) else type(value).__name__} {value!r}"
