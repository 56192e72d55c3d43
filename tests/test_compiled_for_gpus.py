"""The Triton kernel as GPUs get it: compiled without a GPU, and the machine code inspected.

Triton's interpreter runs the kernel in order, in Python's arithmetic. It cannot show what is tested here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
# Small and large storage, both launches, telemetry, digits, and scalars on the device.
FEW = (
    "fp32/fp32/fp32+copy+scalars",
    "remainder/bf16/int8",
    "remainder/bf16/int8+rest",
    "fp32/bf16/bf16+copy+telemetry",
    "fp32/fp32/fp32+copy+digits",
)
# Instructions per element of a whole block.
CEILINGS = {
    "fp32/fp32/fp32+copy": 40,
    "fp32/fp32/fp32+copy+scalars": 40,
    "fp32/fp32/fp32+copy+digits": 75,
    "remainder/bf16/int8": 70,
    "remainder/bf16/int8+digits": 95,
    "many instructions": 40,
}


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(("all", "--processes", "2"), marks=pytest.mark.slow)], ids=["few", "all"]
)
def rows(request, tmp_path_factory):
    found = compiled(tmp_path_factory, "tools.benchmark.compiled", "--variants", *request.param, "--json")
    assert {row["arch"] for row in found} == {80, 90, 100}
    return found


@pytest.fixture(scope="module")
def broken_rows(tmp_path_factory):
    return compiled(tmp_path_factory, "tests.broken_triton_kernels")


def compiled(tmp_path_factory, module, *arguments):
    """The rows that ``module`` writes to the file that is its last argument."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments, str(folder / "rows")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "rows").read_text())


def failing(rows, is_right):
    return [f"{row['name']} on sm_{row['arch']}: {row['facts']}" for row in rows if not is_right(row, row["facts"])]


def keeps_order(row, facts):
    return facts["loads_after_stores"] == 0


def rounds_as_written(row, facts):
    return facts["contracted"] == facts["flushed"] == 0


def has_multiply_adds_only_for_divisions_and_roots(row, facts):
    return facts["fma"] == 0 or "int8" in row["name"]


def keeps_values_in_registers(row, facts):
    return facts["spills"] == 0


def has_wide_accesses(row, facts):
    is_whole = "rest" not in row["name"]
    return not is_whole or (facts["widths"].get("128", 0) == row["wide"] and facts["widths"].get("8", 0) == 0)


def has_few_instructions(row, facts):
    return row["executed"] <= CEILINGS.get(row["name"], float("inf"))


def test_no_address_is_loaded_after_a_store(rows):
    """Triton has no barrier between a store to global memory and another thread's load of the same address."""
    assert not failing(rows, keeps_order)


def test_products_and_sums_round_separately_and_denormals_stay(rows):
    assert not failing(rows, rounds_as_written)


def test_only_divisions_and_roots_have_multiply_adds_in_the_machine_code(rows):
    assert not failing(rows, has_multiply_adds_only_for_divisions_and_roots)


def test_no_register_is_spilled(rows):
    assert not failing(rows, keeps_values_in_registers)


def test_whole_blocks_are_read_and_written_16_bytes_at_a_time(rows):
    assert not failing(rows, has_wide_accesses)


def test_few_instructions_are_executed_per_element(rows):
    assert any(row["name"] in CEILINGS for row in rows)
    assert not failing(rows, has_few_instructions)


@pytest.mark.parametrize(
    "is_right, broken",
    [
        (keeps_order, {"loads after a store"}),
        (rounds_as_written, {"contracts", "flushes denormals"}),
        (has_multiply_adds_only_for_divisions_and_roots, {"contracts"}),
        (keeps_values_in_registers, {"spills"}),
        (has_wide_accesses, {"narrow accesses"}),
        (has_few_instructions, {"many instructions"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_check_finds_its_broken_kernels_and_no_others(broken_rows, is_right, broken):
    assert {row["name"] for row in broken_rows} >= {"intact", *broken}
    assert {row["name"] for row in broken_rows if not is_right(row, row["facts"])} == broken
