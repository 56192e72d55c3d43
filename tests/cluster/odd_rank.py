"""``megatron-lion doctor --cluster`` on every rank, one of which is made odd: odd_rank.py RANK WHAT FLAGS."""

import os
import platform
import sys
import time

import torch.distributed

from megatron_lion.cli import main
from megatron_lion.cli.cluster import network


def make_odd(what: str) -> None:
    if what == "python":
        platform.python_version = lambda: "3.11.9"
    elif what == "clock":
        now = time.time
        time.time = lambda: now() - 7.5
    elif what == "silent":
        time.sleep(120)
    elif what == "stuck":
        network.link_seconds = lambda *_: time.sleep(120)
    elif what == "wrong sum":
        reduce = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda data: (reduce(data), data.add_(1))
    elif what == "slow":
        trip = network._round_trip
        network._round_trip = lambda *args, **kwargs: trip(*args, **kwargs) + 60.0


if __name__ == "__main__":
    if os.environ["RANK"] == sys.argv[1]:
        make_odd(sys.argv[2].replace("-", " "))
    sys.exit(main(["doctor", "--cluster", *sys.argv[3:]]))
