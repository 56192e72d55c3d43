"""What this package replaces, overrides and reads in the Megatron that is installed, against what it declares.

    python tests/megatron/declarations.py                 # what is used and not declared, as a line of JSON
    python tests/megatron/declarations.py renamed         # what registration says of each name that Megatron renames

Run by ``test_versions.py`` on one rank, on every release.
"""

import ast
import dis
import importlib
import inspect
import json
import os
import pkgutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch

import megatron_lion
from megatron_lion.integration import compat, register
from megatron_lion.integration.compat.overriding import OVERRIDDEN


def our_classes() -> Iterator[type]:
    """Each class of this package that has one of Megatron's above it."""
    import megatron_lion.integration as integration

    names = [module.name for module in pkgutil.walk_packages(integration.__path__, integration.__name__ + ".")]
    for name in names:
        if name.endswith(("run_flags", "vocabularies", "bridge")):  # a script, and what needs more than core's wheel
            continue
        for value in list(vars(importlib.import_module(name)).values()):
            if isinstance(value, type) and value.__module__ == name and any(map(is_megatrons, value.__mro__)):
                yield value


def is_megatrons(cls: type) -> bool:
    return cls.__module__.startswith("megatron.")


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("megatron_lion.")


def defined(cls: type) -> set[str]:
    """The names that the body of ``cls`` binds, but for what Python adds."""
    names = {*vars(cls), *cls.__annotations__} - {"_abc_impl"}
    return {name for name in names if name == "__init__" or not name.startswith("__")}


def unmarked(cls: type) -> list[str]:
    """The names that ``cls`` defines, that a class of others above it has, and that are not marked as overrides."""
    above = {name for base in cls.__mro__[1:-1] if not is_ours(base) for name in vars(base)}
    return sorted((defined(cls) & above) - OVERRIDDEN.get(cls, set()))


def attributes(cls: type, context: type[ast.expr_context]) -> set[str]:
    """The names X of which ``cls`` itself reads or sets ``self.X``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and isinstance(node.ctx, context)
    }


def unchecked(cls: type) -> list[str]:
    """The attributes that ``cls`` reads of itself, that Megatron sets, and that no check covers."""
    ours = {name for base in cls.__mro__ if is_ours(base) for name in defined(base) | attributes(base, ast.Store)}
    methods = {name for base in cls.__mro__ for name in vars(base)}
    torchs = {"param_groups", "state"} if issubclass(cls, torch.optim.Optimizer) else set()
    checked = {
        used for seam in register.seams(training=compat.has_training()) if is_about(seam, cls) for used in seam.uses
    }
    return sorted(attributes(cls, ast.Load) - ours - methods - torchs - checked)


def is_about(seam: Any, cls: type) -> bool:
    holder = seam.holder()[0]
    return isinstance(holder, type) and holder in cls.__mro__


def clashing(cls: type) -> Iterator[str]:
    """The attributes of ``cls`` itself that a class of Megatron's above it sets too."""
    ours = attributes(cls, ast.Store) | defined(cls)
    for base in filter(is_megatrons, cls.__mro__):
        for method in filter(inspect.isfunction, vars(base).values()):
            stored = {
                instruction.argval
                for instruction in dis.get_instructions(inspect.unwrap(method))
                if instruction.opname == "STORE_ATTR"
            }
            yield from sorted(stored & ours)


def snapshot() -> dict[tuple[str, str], Any]:
    """Everything that the modules and classes of Megatron and torch.distributed bind."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("megatron.", "torch.distributed.checkpoint")):
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found.update({(name, f"{key}.{inner}"): what for inner, what in vars(value).items()})
    return found


def undeclared() -> list[str]:
    """What registration replaces and no declaration names."""
    training = compat.has_training()
    register.require_known_megatron(training=training)
    declared = [getattr(*seam.holder()) for seam in register.seams(training=training)]
    before = snapshot()
    megatron_lion.register()
    after = snapshot()
    changed = [key for key, value in before.items() if after[key] is not value]
    assert len(changed) > 5
    return [":".join(key) for key in changed if not any(_plain(before[key]) is one for one in declared)]


def _plain(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def wrapped_twice() -> list[str]:
    """Functions of Megatron that two of our wrappers are around: their order would be an accident."""
    patches = register._core_patches() + (register._training_patches() if compat.has_training() else [])
    names = Counter(f"{patch.seam.module}:{patch.seam.name}" for patch in patches)
    return [name for name, number in names.items() if number > 1]


# ---- what registration says where a name is gone ----


def overridden() -> list[tuple[str, str, str]]:
    """Module, class and name of each method of Megatron that ours override, but for those that are torch's too."""
    import megatron_lion.integration.optimizer.factory  # noqa: F401

    found = set()
    for cls, names in OVERRIDDEN.items():
        for name in names - {"__init__"}:
            owners = [base for base in cls.__mro__ if not is_ours(base) and name in vars(base)]
            if owners and all(map(is_megatrons, owners)):
                found.update((base.__module__, base.__qualname__, name) for base in owners)
    return sorted(found)


ATTRIBUTES = [
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.__init__", name)
    for name in (
        "buffers",
        "model_param_gbuf_map",
        "shard_fp32_from_float16_groups",
        "model_float16_groups",
        "model_param_group_index_map",
    )
] + [
    ("megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBuffer.__init__", "param_index_map"),
    ("megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBucket.__init__", "numel_unpadded"),
]


def in_a_child(work: Any) -> Any:
    """What ``work`` returns in a process of its own."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        status = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    assert os.wait()[1] == 0
    return json.loads(text)


def rename_methods(name: str, owners: list[tuple[str, str]]) -> list[str]:
    for module, cls in owners:
        holder = getattr(importlib.import_module(module), cls)
        setattr(holder, f"another_{name.strip('_')}", vars(holder)[name])
        delattr(holder, name)
    return outcome()


def rename_attribute(module: str, function: str, name: str) -> list[str]:
    cls, method = function.split(".")
    target = inspect.unwrap(getattr(getattr(importlib.import_module(module), cls), method))
    target.__code__ = _renamed(target.__code__, name)
    return outcome()


def _renamed(code: CodeType, name: str) -> CodeType:
    names = tuple("another" if one == name else one for one in code.co_names)
    constants = tuple(_renamed(one, name) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.replace(co_names=names, co_consts=constants)


def outcome() -> list[str]:
    """What registration says, and whose function builds optimizers then."""
    import megatron.core.optimizer as optimizers

    said = "nothing"
    try:
        megatron_lion.register()
    except megatron_lion.LionError as error:
        said = str(error)
    built_by = optimizers.get_megatron_optimizer
    return [said, getattr(built_by, "wrapper", built_by).__module__]


def renamed() -> dict[str, list[str]]:
    """For each name that is overridden or read: what registration says where Megatron has renamed it."""
    for seam in compat.seams_of(training=compat.has_training()):
        seam.holder()  # imported here, so that the children need not
    owners: dict[str, list[tuple[str, str]]] = {}
    for module, cls, name in in_a_child(overridden):
        owners.setdefault(name, []).append((module, cls))
    found = {name: in_a_child(lambda n=name, o=where: rename_methods(n, o)) for name, where in owners.items()}
    return found | {what[2]: in_a_child(lambda w=what: rename_attribute(*w)) for what in ATTRIBUTES}


def report() -> dict[str, Any]:
    replaced = undeclared()
    classes = list(dict.fromkeys(our_classes()))
    return {
        "classes": sorted(cls.__name__ for cls in classes),
        "replaced but not declared": replaced,
        "wrapped twice": wrapped_twice(),
        "overriding but not marked": {cls.__name__: names for cls in classes if (names := unmarked(cls))},
        "read but not checked": {cls.__name__: names for cls in classes if (names := unchecked(cls))},
        "set by Megatron too": {cls.__name__: names for cls in classes if (names := list(clashing(cls)))},
    }


if __name__ == "__main__":
    register.before_megatron()
    print("DECLARATIONS", json.dumps(renamed() if "renamed" in sys.argv else report()))
