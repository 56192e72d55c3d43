"""``megatron-lion doctor [--cluster] | enable | disable | rehearse``."""

import argparse
import sys
from typing import NoReturn

from megatron_lion import hook
from megatron_lion.config import did_you_mean
from megatron_lion.version import __version__

COMMANDS = {
    "doctor": "say which Lion a training run here would use, and whether it would work; exit 1 where it would not",
    "enable": "let a plain `torchrun pretrain_gpt.py --optimizer lion` in this environment run this Lion",
    "disable": "undo `enable`",
    "rehearse": "build ranks of a run without a GPU: does it start, and does it fit (rehearse --help)",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megatron-lion: error: {message}\n")


def _command(value: str) -> str:
    if value not in COMMANDS:
        raise argparse.ArgumentTypeError(f"{value!r} is not a command: {did_you_mean(value, COMMANDS)}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["rehearse"]:  # the flags after its script are the script's
        from megatron_lion.cli.rehearse import main as rehearse

        return rehearse(arguments[1:], _Parser)
    parser = _Parser(
        prog="megatron-lion",
        description="Lion for Megatron-Core.",
        epilog="commands:\n" + "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-lion {__version__}")
    parser.add_argument("command", type=_command, metavar="{doctor,enable,disable,rehearse}")
    cluster = parser.add_argument_group(
        "doctor under a launcher, such as torchrun --no-python megatron-lion"
    ).add_argument
    cluster("--cluster", action="store_true", help="check the ranks against each other, clocks and network too")
    cluster("--timeout", type=float, default=60.0, metavar="SECONDS", help="for a rank to answer (default 60)")
    cluster("--megabytes", type=int, default=64, metavar="MiB", help="size of the all-reduces timed (default 64)")
    options = parser.parse_args(arguments)
    command = options.command
    if options.cluster and command != "doctor":
        parser.error(f"--cluster belongs to doctor, not to {command}: megatron-lion doctor --cluster")
    if not (options.timeout > 0 and options.megabytes > 0):
        parser.error(f"--timeout {options.timeout:g} and --megabytes {options.megabytes} must be above 0")
    if options.cluster:
        from megatron_lion.cli.cluster.report import main as doctor_cluster

        return doctor_cluster(options.timeout, options.megabytes)
    if command == "doctor":
        from megatron_lion.cli.doctor import main as doctor

        return doctor()
    try:
        hook.enable() if command == "enable" else hook.disable()
    except OSError as error:
        print(f"megatron-lion: error: cannot write {hook.pth_path()}: {error.strerror}", file=sys.stderr)
        return 2
    state = "enabled" if hook.is_enabled() else "disabled"
    print(f"megatron-lion {state} in {sys.prefix} ({hook.pth_path()}). `megatron-lion doctor` says what runs now.")
    return 0
