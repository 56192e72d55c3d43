"""``--help`` of every script: it ends well, names the script, and says each default once, as it is.

The scripts run in processes that are forked from one with its imports done, as the ranks of other tests do.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.launcher.forked_script import become
from tests.harness import CPU_ENVIRONMENT, ROOT

FOLDERS = ("launch", "tools", "megatron_lion")
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
SHELL = ("launch/demo.sh", "tools/gpu_check.sh", "tools/benchmark/run_all.sh")
COMMANDS = ([], ["doctor"], ["enable"], ["disable"])
LINES = [(str(path), words) for path in SCRIPTS for words in (COMMANDS if path.parts[1] == "cli" else COMMANDS[:1])]
# A default in a help text. Megatron's own texts, of which we correct none, have other forms.
DEFAULT = re.compile(r"\(default: (.*?)\)", re.DOTALL)


def show_help(script: str, words: list[str], folder: str) -> None:
    """Run ``script words --help``; its output goes to FOLDER/output, its options and defaults to FOLDER/options."""
    stock = argparse.ArgumentParser.print_help

    def print_help(parser: argparse.ArgumentParser, file: Any = None) -> None:
        stock(parser, file)
        formatter = parser._get_formatter()
        options = [
            (action.option_strings, described(action), formatter._expand_help(action))
            for action in parser._actions
            if action.help
        ]
        Path(folder, "options").write_text(json.dumps(options))

    argparse.ArgumentParser.print_help = print_help  # type: ignore[method-assign]
    become(str(ROOT / script), [*words, "--help"], f"{folder}/output", {**CPU_ENVIRONMENT, "COLUMNS": "200"})


def described(action: argparse.Action) -> str | None:
    """How a help text should give the option's default; None where it has none that a user could wonder about."""
    value = action.default
    if value in (None, False, argparse.SUPPRESS, [], [""]) or action.nargs == 0:
        return None
    if isinstance(value, list | tuple):
        return "all" if list(value) == list(action.choices or ()) else " ".join(map(str, value))
    return str(value)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | None, str, list[Any]]]:
    """For each line of ``LINES``: exit status, output, and each option with its default and its help."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.preloaded"])
    found = {}
    for script, words in LINES:
        folder = tmp_path_factory.mktemp("help")
        process = server.Process(target=show_help, args=(script, words, str(folder)))
        process.start()
        process.join(timeout=60)
        options = folder / "options"
        entries = json.loads(options.read_text()) if options.exists() else []
        found[" ".join([script, *words])] = process.exitcode, (folder / "output").read_text(), entries
    return found


@pytest.mark.parametrize("line", [" ".join([script, *words]) for script, words in LINES])
def test_help_ends_well_and_says_each_default_as_it_is(line: str, shown: dict[str, Any]) -> None:
    status, output, options = shown[line]
    assert status == 0, output[-3000:]
    assert "Traceback" not in output
    usage = next(text for text in output.splitlines() if text.startswith("usage: "))
    script = Path(line.split()[0])
    assert any(name in usage for name in (script.stem, script.parent.name, "megatron-lion"))
    assert [flags for flags, default, text in options if is_ours(flags, line) and not says(default, text)] == []


def is_ours(flags: list[str], line: str) -> bool:
    """Whether the option is this project's: the pretraining scripts have Megatron's too."""
    return "pretrain" not in line or any(flag.startswith(("--lion-", "--norm-ratio-")) for flag in flags)


def says(default: str | None, text: str) -> bool:
    """Whether a help text gives ``default`` once, and no other one; without a default it may say what then holds."""
    named = DEFAULT.findall(text)
    return named == [default] if default is not None else len(named) <= 1 and "%(" not in text


def test_a_default_that_is_missing_wrong_or_doubled_is_found() -> None:
    assert says("3", "rounds (default: 3)") and says(None, "rounds (default: the file's)")
    wrong = ("rounds", "rounds (3)", "rounds (default: 4)", "(default: 3) (default: 3)")
    assert not any(says("3", text) for text in wrong)


@pytest.mark.parametrize("script", SHELL)
def test_help_of_a_shell_script_starts_nothing(script: str, tmp_path: Path) -> None:
    line = ["bash", str(ROOT / script), "--help"]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=30, cwd=tmp_path, env={"PATH": os.environ["PATH"]}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(script).name in done.stdout.splitlines()[0]
    assert not any(tmp_path.iterdir())
