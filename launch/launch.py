#!/usr/bin/env python3
"""Start a recipe: ``python launch/launch.py MODEL OPTIMIZER CLUSTER``; ``--help`` says more (launcher/main.py)."""

import sys

try:
    from launcher.main import main

    from megatron_lion.run import readable_errors
except ModuleNotFoundError as error:  # before there is anything that could print an error
    needed = {"megatron_lion": "pip install . in the repository's root", "yaml": "pip install pyyaml"}
    package = str(error.name).partition(".")[0]
    if package not in needed:
        raise
    print(f"megatron-lion: error: {sys.executable} has no {package}: {needed[package]}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    with readable_errors():
        sys.exit(main(sys.argv[1:]))
