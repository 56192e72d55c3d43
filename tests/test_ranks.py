"""The port that the ranks of a test meet at."""

import contextlib
import socket

import pytest
from torch.distributed import TCPStore

from tests.ranks import reserved_port


def test_a_reserved_port_is_rank_0s_and_nobody_elses() -> None:
    with contextlib.closing(reserved_port()) as reserved, contextlib.closing(socket.socket()) as other:
        address = reserved.getsockname()
        with pytest.raises(OSError, match="already in use"):
            other.bind(address)
        store = TCPStore(*address, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert store.get("key") == b"value"


def test_no_port_is_given_twice() -> None:
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(contextlib.closing(reserved_port())).getsockname()[1] for _ in range(200)]
        assert len(set(ports)) == len(ports)
