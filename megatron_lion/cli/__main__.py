"""``python -m megatron_lion.cli``: the ``megatron-lion`` command."""

import sys

from megatron_lion.cli import main

if __name__ == "__main__":
    sys.exit(main())
