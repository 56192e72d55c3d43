"""Write docs/api.md: the signatures and docstrings of the public classes and functions, read from the source.

python tools/api_page.py docs/api.md
"""

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# API

The public names of the package, with their docstrings. `python tools/api_page.py docs/api.md` writes this page. Under
Megatron each option of Lion is also a flag, and a field of `OptimizerConfig` ([Other frameworks](frameworks.md)).
"""
# Name to import, the file that defines it, and the methods to list.
PUBLIC = {
    "megatron_lion.register": ("integration/register.py", ()),
    "megatron_lion.Lion": ("lion.py", ("step", "load_state_dict")),
    "megatron_lion.Reports": ("integration/reporting/reports.py", ("after_step",)),
    "megatron_lion.NormRatioOptions": ("config.py", ()),
    "megatron_lion.LionError": ("config.py", ()),
    "megatron_lion.integration.bridge.LionOptimizerConfig": ("integration/bridge.py", ()),
    "megatron_lion.update.lion_step": ("update.py", ()),
    "megatron_lion.telemetry.Telemetry": ("telemetry.py", ()),
    "megatron_lion.stats.full_gradient": ("stats/full_gradient.py", ()),
}
Definition = ast.ClassDef | ast.FunctionDef


def definition(body: list[ast.stmt], name: str) -> Definition:
    """The class or function ``name`` in ``body``."""
    return next(node for node in body if isinstance(node, Definition) and node.name == name)


def signature(name: str, node: Definition) -> str:
    """The call as written in the source. A dataclass has its fields as parameters."""
    if isinstance(node, ast.FunctionDef):
        return f"{name}({ast.unparse(node.args)})".replace("(self, ", "(").replace("(self)", "()")
    inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if inits:
        return signature(name, inits[0])
    fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    return f"{name}({', '.join(fields)})" if node.decorator_list else name


def section(name: str, node: Definition, level: int) -> str:
    """A heading, the signature and the docstring."""
    call = signature(name.rpartition(".")[2], node)
    return f"\n{'#' * level} {name}\n\n```python\n{call}\n```\n\n```text\n{ast.get_docstring(node)}\n```\n"


def page() -> str:
    """The page as Markdown."""
    text = HEAD
    for name, (file, methods) in PUBLIC.items():
        tree = ast.parse((ROOT / "megatron_lion" / file).read_text(encoding="utf-8"))
        node = definition(tree.body, name.rpartition(".")[2])
        text += section(name, node, 2)
        for method in methods:
            text += section(f"{node.name}.{method}", definition(node.body, method), 3)
    return text


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="Markdown file to write")
    parser.parse_args().output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
