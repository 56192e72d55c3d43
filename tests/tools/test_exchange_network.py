"""The gather on limited links between network namespaces: bytes as the interfaces count them."""

import pytest

from tools.benchmark import exchange_network


@pytest.mark.slow
def test_the_interface_sends_a_fifth_of_the_bytes_for_bf16_and_a_twentieth_for_fp32() -> None:
    if (why := exchange_network.problem()) is not None:
        pytest.skip(why)
    with exchange_network.network(2, 1000) as names:
        flags = ("--parameters", "3840000", "--repeats", "5", "--exceptions", "0.0004")
        rows = {row["kind"]: row for row in exchange_network.exchange(names, 1, *flags)}
    for kind, least in (("bf16", 4.8), ("fp32", 19.0)):
        sent = rows[kind]["bytes"]
        assert sent["params"] > rows[kind]["parameters"] / 2 * (2 if kind == "bf16" else 4)
        assert sent["params"] > least * sent["signs"]
