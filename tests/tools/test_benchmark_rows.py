"""The benchmark of the CPU kernel in the cache runs for every storage."""

import re
import sys

from tools.benchmark import in_cache, rows


def test_every_storage_and_row_length_has_a_time(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["in_cache", "--samples", "20", "--rows", "1024", "100"])
    monkeypatch.setattr(in_cache, "NUMEL", 1024)
    in_cache.main()
    found = re.findall(r"^\| (.+?)(?:, rows of ([\d,]+))? \| (\d+\.\d+) \|$", capsys.readouterr().out, re.MULTILINE)
    lengths = {storage: ["1,024", "100"] if storage[1] == "int8" else [""] for storage in rows.STORAGES}
    assert [(name, length) for name, length, _ in found] == [
        (rows.name_of(storage), length) for storage in rows.STORAGES for length in lengths[storage]
    ]
    assert all(float(nanoseconds) > 0 for *_, nanoseconds in found)
