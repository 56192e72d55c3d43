"""``megatron-lion doctor [SCRIPT] [FLAGS...] | doctor --cluster | enable | disable | rehearse``."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megatron_lion import hook
from megatron_lion.nearest import did_you_mean
from megatron_lion.version import __version__

COMMANDS = {
    "doctor": "report which Megatron and which Lion a training command would use, and whether it would work",
    "enable": "make a plain `torchrun pretrain_gpt.py --optimizer lion` in this environment run this Lion",
    "disable": "undo `enable`",
    "rehearse": "build ranks of a run without a GPU: does it start, and does it fit (rehearse --help)",
}
DOCTOR = """Report which Megatron and which Lion a training command would use, and whether it would work. Exit
status 1 if it would not; the last line has the reason.

    megatron-lion doctor
    megatron-lion doctor /path/to/Megatron-LM/pretrain_gpt.py --optimizer lion ...
    torchrun --nproc-per-node 8 --no-python megatron-lion doctor --cluster
"""
WITHOUT_ENABLE = (
    "Use `torchrun -m megatron_lion.run SCRIPT` instead, or call megatron_lion.register() in the script, or install "
    "into an environment that you may write: python -m venv --system-site-packages DIR"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megatron-lion: error: {message}\n")


def _parser() -> _Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="megatron-lion", description="Lion for Megatron-Core.", formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"megatron-lion {__version__}")
    commands = parser.add_subparsers(
        title="commands",
        dest="command",
        metavar="{doctor,enable,disable,rehearse}",
        required=True,
        parser_class=_Parser,
    )
    doctor = commands.add_parser(
        "doctor",
        help=COMMANDS["doctor"],
        description=DOCTOR,
        formatter_class=raw,
        usage="megatron-lion doctor [-h] [--verbose] [SCRIPT] [FLAGS ...] | --cluster [--timeout SECONDS] "
        "[--megabytes MiB]",
        allow_abbrev=False,  # the flags are the script's
    )
    doctor.add_argument("script", nargs="?", type=Path, metavar="SCRIPT", help="the script that torchrun would start")
    doctor.add_argument("--verbose", action="store_true", help="list every compatibility check")
    cluster = doctor.add_argument_group("on every rank of a launcher").add_argument
    cluster("--cluster", action="store_true", help="check the ranks against each other, clocks and network too")
    cluster(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long a rank may take to answer (default: %(default)s)",
    )
    cluster(
        "--megabytes",
        type=int,
        default=64,
        metavar="MiB",
        help="size of the timed all-reduces (default: %(default)s)",
    )
    commands.add_parser("rehearse", help=COMMANDS["rehearse"], add_help=False)  # cli/rehearse has its parser
    for name in ("enable", "disable"):
        commands.add_parser(name, help=COMMANDS[name], description=f"{name}: {COMMANDS[name]}.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["rehearse"]:  # the flags after its script are the script's
        from megatron_lion.cli.rehearse import main as rehearse

        return rehearse(arguments[1:], _Parser)
    parser = _parser()
    word = next((word for word in arguments if not word.startswith("-")), None)
    if word is not None and word not in COMMANDS:
        parser.error(f"{word!r} is not a command: {did_you_mean(word, COMMANDS)}")
    options, flags = parser.parse_known_args(arguments)
    if options.command == "doctor":
        return _doctor(parser, options, flags)
    if flags:
        parser.error(f"{options.command} takes no arguments, got {flags[0]}")
    return _switch(options.command)


def _doctor(parser: _Parser, options: argparse.Namespace, flags: list[str]) -> int:
    if options.script is None and flags:
        parser.error(f"unknown option {flags[0]}. Flags of a training script come after it: doctor SCRIPT FLAGS")
    if options.script is not None and not options.script.is_file():
        parser.error(f"{options.script} is not a file: pass the path of your training script, without -m")
    if not (options.timeout > 0 and options.megabytes > 0):
        parser.error(f"--timeout {options.timeout:g} and --megabytes {options.megabytes} must be above 0")
    if not options.cluster:
        from megatron_lion.cli.doctor import main as doctor

        return doctor(options.script, flags, verbose=options.verbose)
    if options.script is not None:
        parser.error("--cluster checks the ranks, not a script: remove one of them")
    from megatron_lion.cli.cluster.report import main as doctor_cluster

    return doctor_cluster(options.timeout, options.megabytes)


def _switch(command: str) -> int:
    """Enable or disable the import hook and print the result."""
    try:
        path = hook.enable() if command == "enable" else hook.disable()
    except OSError as error:
        way_out = f". {WITHOUT_ENABLE}" if command == "enable" else ""
        print(f"megatron-lion: error: cannot write {error.filename}: {error.strerror}{way_out}", file=sys.stderr)
        return 2
    print(f"megatron-lion {command}d in {sys.prefix} ({path}). `megatron-lion doctor` says what runs now.")
    return 0
