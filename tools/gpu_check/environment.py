"""Describe this machine, and list what the check needs and does not find.

    python -m tools.gpu_check.environment [--device cuda] [--rows FILE]

Exit status 0: nothing is missing. 1: something is missing, and the parts that need it will fail. 2: nothing can be
checked here.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_check import records

MODULES = {
    "triton": "the Triton kernels",
    "pytest": "the tests",
    "numpy": "the tests and Megatron",
    "megatron.core": "the Megatron runs",
    "megatron.training": "the Megatron runs",
}
VERSIONS = ("torch", "triton", "numpy", "megatron-core", "flashoptim", "bitsandbytes", "transformer-engine")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Problem:
    """Something that is missing; with ``fatal``, nothing can be checked without it."""

    text: str
    fatal: bool = False


def problems(device: str) -> list[Problem]:
    """Everything that is missing, the most basic first."""
    torch = torch_problem(device)
    found = [torch]
    if device == "cuda":
        found += [libcuda_problem(), compiler_problem(), header_problem()]
    imports = {name: import_problem(name, purpose) for name, purpose in MODULES.items()}
    found += imports.values()
    if device == "cuda" and not torch and not imports["triton"]:
        from tools.gpu_check.probe import launch_problem

        found.append(Problem(text) if (text := launch_problem()) else None)
    return [problem for problem in found if problem]


def torch_problem(device: str) -> Problem | None:
    """Why torch cannot use the GPU, in torch's own words."""
    try:
        import torch
    except Exception as error:  # a broken install raises OSError or AttributeError as well
        return Problem(f"torch cannot be imported: {type(error).__name__}: {error}", fatal=True)
    if device == "cpu":
        return None
    if torch.version.cuda is None:
        return Problem(f"torch {torch.__version__} was built without CUDA; install a CUDA build", fatal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says the same as the error below
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is False"
        except Exception as error:
            reason = f"torch says: {error}"
    driver = driver_version()
    hint = f"the driver is {driver}" if driver else "no NVIDIA driver was found"
    return Problem(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; {hint}; {reason}", fatal=True)


def driver_version() -> str | None:
    """The version of NVIDIA's driver, from the kernel or from nvidia-smi."""
    with contextlib.suppress(OSError):
        text = DRIVER_FILE.read_text(encoding="utf-8")
        if match := re.search(r"Module.*?\s(\d+\.[\d.]+)\s", text):
            return match[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
    return None


def libcuda_problem() -> Problem | None:
    """Triton links its launcher against libcuda.so.1, which it looks up with ldconfig."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Problem(f"libcuda.so.1 cannot be loaded ({error}); it comes with the NVIDIA driver")
    folders = [os.environ.get("TRITON_LIBCUDA_PATH", ""), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    if any(folder and Path(folder, "libcuda.so.1").exists() for folder in folders):
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=20)
        if "libcuda.so.1" in done.stdout:
            return None
    return Problem(
        "libcuda.so.1 is not in ldconfig's cache, where Triton looks for it; "
        "run /sbin/ldconfig, or set TRITON_LIBCUDA_PATH to its folder"
    )


def compiler_problem() -> Problem | None:
    """Triton compiles its launcher in C at the first launch."""
    named = os.environ.get("CC")
    if any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):
        return None
    what = f"CC={named} is not on PATH" if named else "no C compiler: neither gcc nor clang is on PATH"
    return Problem(f"{what}; Triton needs one at its first launch. Install gcc, or set CC")


def header_problem() -> Problem | None:
    """The same C code includes Python.h."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton does: Debian's default has no headers
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    if header.is_file():
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Problem(f"{header} does not exist; Triton needs it at its first launch. Install python{version}-dev")


def import_problem(name: str, purpose: str) -> Problem | None:
    """Why ``name`` cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:
        return Problem(f"{name}, needed by {purpose}, cannot be imported: {type(error).__name__}: {error}")
    return None


def machine(device: str) -> dict[str, str]:
    """The GPU and the versions that matter, as far as they can be found out."""
    found = {"Python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device == "cpu":
        return {"GPU": "none (rehearsal on the CPU)", **found}
    found = {"driver": driver_version() or "unknown", **found}
    with contextlib.suppress(Exception):  # the problem is reported by torch_problem
        import torch

        about = torch.cuda.get_device_properties(0)
        capability = f"sm_{about.major}{about.minor}"
        size = f"{about.total_memory / 2**30:.0f} GiB"
        found = {"GPU": f"{about.name}, {capability}, {size}", "CUDA of torch": str(torch.version.cuda), **found}
    return found


def main() -> int:
    """Print and record both; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    missing = problems(args.device)
    for problem in missing:
        print(f"missing: {problem.text}", flush=True)
    here = machine(args.device)
    print("; ".join(f"{name} {value}" for name, value in here.items()))
    records.append(args.rows, environment=here, missing=[problem.text for problem in missing])
    return 2 if any(problem.fatal for problem in missing) else int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
