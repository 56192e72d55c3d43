"""Run every command of README.md and the manuals in docs/ as it is written, and record the exit status.

    python -m tests.doc_commands docs/results/commands.md [--demo FOLDER] [--match REGEX]

Commands run in a fresh clone, in a clean environment with this package and megatron-core, on the CPU. ``--demo`` is the
output of a run of the demo, for commands that read runs/demo. A command that cannot run here is listed with the reason.
"""

import argparse
import datetime
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.clean_environments import Clean
from tests.harness import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\w+=\S+ )*(?:pip|python|megatron-lion|torchrun|\./\w+/\w+\.sh|tools/\w+\.sh)\b[^`\n]*)`")
# Code spans that are parts of a command, or a log line.
FRAGMENT = re.compile(r"(torchrun( --[\w-]+ \d+)*|megatron-lion: .*|python tools/\w+\.py|megatron-lion rehearse)$")
# The first pattern that a command matches says why it does not run here.
NOT_RUN = {
    r"srun|docker|apptainer|--slurm slurm-": "needs a program that is not installed here",
    r"\.\.\.|/path/to|<--|\[SCRIPT\]|mycluster|\b(SCRIPT|DIR|IMAGE|VERSION|MODEL)\b": "a template",
    r"^tools/gpu_check\.sh|--device cuda": "needs a GPU",
    r"tests/(run|full|versions)\.sh|-m pytest|GPU_CHECK_DEVICE=cpu": "run with the tests",
    r"demo\.sh": "recorded in [The demo](demo.md)",
    r"-m tools\.(paper|benchmark)": "takes long, recorded with its results",
    r"text/\*|data/owt|gpt2-small-lion": "needs your own text or checkpoints",
    r"install --user|^pip install transformers": "changes the user's environment",
}
HEAD = """# Commands

Every command of the README and of the manuals in `docs/`, run as written by `python -m tests.doc_commands`
({when}). They ran in a fresh clone, in a clean environment with this package and megatron-core, on a
machine without a GPU (`MEGATRON_LION_DEVICE=cpu`). `runs/demo` was the output of the demo.

| page | command | exit status |
|---|---|---|
"""


def commands(text: str) -> Iterator[str]:
    """The commands in the bash blocks and in the code spans of a Markdown ``text``, without comments."""
    for block in FENCE.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if command := re.sub(r"(^|\s+)# .*", "", line).strip():
                yield command
    for command in INLINE.findall(FENCE.sub("", text)):
        if not FRAGMENT.match(command) and (" " in command or command.endswith(".sh")):
            yield command


def reason_not_to_run(command: str) -> str | None:
    """Why the command does not run here, or None."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command)), None)


def exit_status(clean: Clean, command: str) -> str:
    """Run ``command`` in the clone. Returns its exit status, and prints the end of its output if that is not 0."""
    try:
        output = clean.run(
            f"cd clone; yes | bash -c {shlex.quote(command)}; code=$?; echo; echo status $code", status=None
        )
    except subprocess.TimeoutExpired:
        return "stopped after 600 s"
    status = output.split()[-1]
    if status != "0":
        print(f"{command}\n{output[-1500:]}", flush=True)
    return status


def main() -> None:
    """Run the commands and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="Markdown file to write")
    parser.add_argument("--demo", type=Path, help="output of a run of the demo")
    parser.add_argument("--match", default="", help="only commands that match this regular expression")
    options = parser.parse_args()
    rows, seen = [], set()
    with tempfile.TemporaryDirectory(prefix="commands-") as folder:
        clean = Clean(Path(folder) / "user")
        clone = clean.folder / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        clean.run("pip install -q setuptools && pip install -q --no-build-isolation ./megatron-lion")
        if options.demo:
            (clone / "runs").mkdir()
            (clone / "runs" / "demo").symlink_to(options.demo.resolve())
        found = [(page, command) for page in PAGES for command in commands((ROOT / page).read_text(encoding="utf-8"))]
        for page, command in sorted(found, key=lambda pair: "uninstall" in pair[1]):  # uninstall comes last
            if command in seen or not re.search(options.match, command):
                continue
            seen.add(command)
            reason = reason_not_to_run(command)
            result = f"not run: {reason}" if reason else exit_status(clean, command)
            rows.append(f"| {page} | `{command.replace('|', chr(92) + '|')}` | {result} |")
            print(rows[-1], flush=True)
    when = f"{datetime.date.today().isoformat()}, Python {sys.version.split()[0]}"
    options.page.write_text(HEAD.format(when=when) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
