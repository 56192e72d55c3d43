"""launch.py in a Python without the packages that it needs: one line that says what to install."""

import subprocess
import sys

import pytest

from tests.harness import ROOT


@pytest.mark.parametrize(("module", "remedy"), [("yaml", "pip install pyyaml"), ("megatron_lion", "pip install .")])
def test_a_missing_package_is_one_line_with_the_remedy(module: str, remedy: str) -> None:
    hidden = f"import runpy, sys; sys.modules[{module!r}] = None; sys.path.insert(0, 'launch'); "
    line = [sys.executable, "-c", hidden + "runpy.run_path('launch/launch.py', run_name='__main__')"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-lion: error: ") and done.stderr.count("\n") == 1
    assert f"has no {module}: {remedy}" in done.stderr
