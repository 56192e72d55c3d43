"""``megatron-lion doctor | enable | disable``."""

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
    parser = _Parser(
        prog="megatron-lion",
        description="Lion for Megatron-Core.",
        epilog="commands:\n" + "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-lion {__version__}")
    parser.add_argument("command", type=_command, metavar="{doctor,enable,disable}")
    command = parser.parse_args(arguments).command
    if command == "doctor":
        from megatron_lion.doctor import main as doctor

        return doctor()
    try:
        hook.enable() if command == "enable" else hook.disable()
    except OSError as error:
        print(f"megatron-lion: error: cannot write {hook.pth_path()}: {error.strerror}", file=sys.stderr)
        return 2
    state = "enabled" if hook.is_enabled() else "disabled"
    print(f"megatron-lion {state} in {sys.prefix} ({hook.pth_path()}). `megatron-lion doctor` says what runs now.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
