"""Runs with Megatron-Bridge, whose wheels are beside the environment's."""

import os
from pathlib import Path

import pytest

from megatron_lion.integration.compat.versions import minor_version
from tests import wheels
from tests.harness import ROOT, Run, torchrun

HERE = Path(__file__).parent


def run(script: str, *flags: str, ranks: int = 2) -> Run:
    """Run a script of this folder with Bridge on its path. Skips the test if Bridge cannot be fetched."""
    if minor_version() < "0.19":
        pytest.skip("Megatron-Bridge 0.6.2 needs megatron-core 0.19")
    packages = wheels.of_requirements(HERE / "requirements.txt")
    path = os.pathsep.join([str(ROOT), str(packages), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return torchrun(*flags, ranks=ranks, script=HERE / script, environment=environment, timeout=600.0)
