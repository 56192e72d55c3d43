"""Which module of the package may import which, and what importing the package costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_lion

PACKAGE = Path(megatron_lion.__file__).parent


def python(code):
    """Run ``code`` in a fresh interpreter that finds this package and fails to import anything of Megatron."""
    block = """
import sys
class NoMegatron:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron":
            raise ImportError(f"{name} is blocked by the test")
sys.meta_path.insert(0, NoMegatron())
"""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", block + code]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


def test_lion_works_where_megatron_is_absent():
    done = python(
        """
try:
    import megatron.core
except ImportError:
    pass
else:
    raise SystemExit("the block does not work")
import megatron_lion, torch
param = torch.nn.Parameter(torch.ones(1))
param.grad = torch.ones(1)
megatron_lion.Lion([param], lr=0.5).step()
assert param.item() == 0.5
"""
    )
    assert done.returncode == 0, done.stderr


def test_what_reads_a_checkpoint_does_not_import_megatron():
    """tools/eval_wikitext103.py reads one before it registers, and without a GPU Megatron must not be there earlier."""
    done = python("import megatron_lion.integration.checkpoint.integrity")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["megatron_lion", "megatron_lion.config", "megatron_lion.hook"])
def test_importing_the_package_imports_neither_torch_nor_numpy(module):
    """The import hook of ``megatron-lion enable`` runs in every interpreter of the environment, also in pip."""
    done = python(f"import {module}\nprint({{'torch', 'numpy', 'megatron'}} & sys.modules.keys())")
    assert done.stdout.strip() == "set()", done.stderr


# What each module or folder of the package may import: others of the package, and what is not in the standard library.
# "megatron_lion" is the package itself, whose imports of torch and Megatron are inside functions.
ALL_PURE = {
    "telemetry",
    "megatron_lion",
    "config",
    "nearest",
    "update",
    "precision",
    "exchange",
    "kernels",
    "step",
    "storage",
    "plan",
    "lion",
    "stats",
    "torch",
}
MAY_IMPORT = {
    "megatron_lion": {"config", "version", "lion", "integration"},
    "config": {"nearest"},
    "nearest": set(),
    "version": set(),
    "update": {"precision", "step", "telemetry", "torch"},
    "telemetry": {"torch"},
    "precision": {"torch"},
    "exchange": {"exchange", "precision", "torch"},
    "kernels": {"kernels", "config", "exchange", "update", "precision", "step", "telemetry", "torch", "triton"},
    "storage": {"config", "precision", "step", "torch"},
    "step": {"precision", "telemetry", "torch"},
    "plan": {"step", "storage", "torch"},
    "param_groups": {"config", "torch"},
    "lion": {
        "kernels",
        "param_groups",
        "plan",
        "config",
        "update",
        "precision",
        "step",
        "storage",
        "telemetry",
        "torch",
    },
    "stats": {"stats", "config", "torch"},
    "integration": ALL_PURE | {"integration", "version", "megatron", "transformer_engine", "numpy"},
    "run": {"megatron_lion", "config", "integration"},
    "hook": {"megatron_lion", "config", "run", "integration"},
    "training_log": {"config"},
    "cli": ALL_PURE | {"cli", "hook", "integration", "run", "version"},
}


def layer(name):
    """megatron_lion.kernels.foreach -> kernels, torch.nn -> torch, and megatron_lion -> itself."""
    package, _, inner = name.partition(".")
    return inner.split(".")[0] if package == "megatron_lion" and inner else package


def imports(path):
    """The full names that a file imports anywhere in it, standard library left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] not in sys.stdlib_module_names)


def is_module(name):
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    """maths <- kernels <- optimizer <- integration <- commands; only integration/ imports Megatron."""
    here = layer("megatron_lion." + file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    here = "megatron_lion" if here == "__init__" else here
    assert here in MAY_IMPORT, f"{file} is new: say in MAY_IMPORT what it may import"
    wrong = sorted({name for name in imports(PACKAGE / file) if layer(name) not in MAY_IMPORT[here]})
    assert not wrong, f"{file} may import {sorted(MAY_IMPORT[here])}, but imports {wrong}"
