#!/usr/bin/env python3
"""Start a recipe: ``python launch/launch.py MODEL OPTIMIZER CLUSTER``; ``--help`` says more (launcher/main.py)."""

import sys

from launcher.main import main

from megatron_lion.run import readable_errors

if __name__ == "__main__":
    with readable_errors():
        sys.exit(main(sys.argv[1:]))
