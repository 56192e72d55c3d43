"""Check once, in a separate process, that the Triton kernel has the reference's bits on this device.

The check covers the storage that the run uses. Its result is kept for later runs, until the package's code, Triton,
torch, the driver or the GPU changes. It issues no collective. Ranks of one node wait for the first one's result.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from megatron_lion.config import check_choice
from megatron_lion.kernels.self_check import records
from megatron_lion.step import ROLES, StepKind

VARIABLE = "MEGATRON_LION_SELF_CHECK"
KERNEL = "megatron_lion.kernels.triton_lion:lion_update_triton_"
# An H100 runs 132 x 10 programs of 1,024 elements at once: with fewer elements, a race between them may not show.
NUMEL = 2_097_151
SECONDS = 180.0
PACKAGE = Path(__file__).parents[2]
COMMAND = (sys.executable, "-P", "-m", __name__)
REPORT = "Please report this message with the versions of torch, Triton and the driver"
# A difference stays until something changes. A crash or a timeout may have had a passing cause.
YEAR, TEN_MINUTES = 365 * 86400.0, 600.0


class Result(NamedTuple):
    """Whether the kernel may be used, and the reason or the extent of the check, for the start-up line."""

    passed: bool
    text: str


@dataclass(frozen=True)
class Check:
    """What is checked: a kernel ("module:function") for one kind of tensors. The largest has ``numel`` elements."""

    kind: StepKind
    numel: int = NUMEL
    telemetry: bool = True
    kernel: str = KERNEL
    seconds: float = SECONDS

    def request(self) -> records.Record:
        """What the child process is asked."""
        dtypes = {role: getattr(self.kind, role) for role in ROLES}
        names = {role: None if dtype is None else str(dtype).removeprefix("torch.") for role, dtype in dtypes.items()}
        return {"kind": names, "numel": self.numel, "telemetry": self.telemetry, "kernel": self.kernel}


_results: dict[StepKind, Result] = {}


def result_for(kind: StepKind) -> Result:
    """Whether ``auto`` may use the Triton kernel for tensors of ``kind``, on its device.

    The first call for a kind makes the check or reads its result. Warns once per node if the kernel fails. While a
    CUDA graph is captured nothing is checked, and the answer is no.
    """
    if kind not in _results:
        if _is_capturing(kind.device):
            return Result(False, "not checked before a CUDA graph was captured")
        _results[kind] = _decide(kind)
    return _results[kind]


def _is_capturing(device: torch.device) -> bool:
    is_used = torch.cuda.is_available() and device.type == "cuda"
    return is_used and torch.cuda.is_current_stream_capturing()


def _decide(kind: StepKind) -> Result:
    if check_choice(VARIABLE, os.environ.get(VARIABLE, "1"), ("0", "1")) == "0":
        return Result(False, f"{VARIABLE}=0")
    if importlib.util.find_spec("triton") is None:
        return Result(False, "Triton is not installed")
    try:
        result = run(Check(kind))
    except Exception as error:  # whatever is wrong with the GPU, Triton or the system, the run continues with foreach
        return Result(False, f"no self-check: {error}")
    if not result.passed and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"Lion's Triton kernel {result.text}. The foreach kernel is used, which is slower but has the bits of the "
            f"reference. {_cache_problem() or REPORT}",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def _cache_problem() -> str | None:
    """Why Triton cannot store what it compiles, as without a home folder, and what to do; else None."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"Triton's cache cannot be written ({error}): set TRITON_CACHE_DIR to a folder that can"
    return None


def run(check: Check) -> Result:
    """The result of ``check``, made in a child process if it is not known. Waits while another process makes it."""
    name = device_name(check.kind.device)
    key = _key(check, name)
    try:
        path = records.path_of(key)
    except OSError:  # no folder for it: each process checks at each start
        return _result(_run_child(check), name)
    record = records.read(path, key)
    if record is None:
        with records.locked(path, 2 * check.seconds):
            record = records.read(path, key)  # of a process that had the lock before
            if record is None:
                record = _run_child(check)
                records.write(path, key, record, YEAR if "failure" not in record else TEN_MINUTES)
    return _result(record, name)


def device_name(device: torch.device) -> str:
    """The GPU's name. Raises RuntimeError or AssertionError where torch has no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, in Triton's interpreter"


def _result(record: records.Record, name: str) -> Result:
    if failure := record.get("failure"):
        return Result(False, f"could not be checked on {name}: {failure}")
    if difference := record["difference"]:
        return Result(False, f"failed its self-check on {name}: {difference}")
    return Result(True, f"self-checked on {name}: {record['elements'] / 1e6:.1f} M elements, {record['seconds']:.2f} s")


def _key(check: Check, device: str) -> records.Record:
    """Everything that the result depends on, as JSON gives it back."""
    import triton

    return {
        "sources": _source_hash(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "settings": _triton_settings(),
        "driver": _driver_version() if check.kind.device.type == "cuda" else "",
        "device": device,
        **check.request(),
    }


def _triton_settings() -> dict[str, str]:
    """Environment variables that may change what Triton compiles, or whether it does."""
    names = (name for name in sorted(os.environ) if name.startswith("TRITON_") and not name.endswith(("_DIR", "_HOME")))
    return {name: os.environ[name] for name in names}


@functools.cache
def _source_hash() -> str:
    """Of the kernels, and of the modules that define the update."""
    files = sorted([*PACKAGE.glob("*.py"), *(PACKAGE / "kernels").rglob("*.py")])
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _driver_version() -> str:
    """The driver's build where the system says it, and the CUDA version that it supports."""
    parts = []
    try:
        parts.append(Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0])
    except (OSError, IndexError):
        parts.append("unknown")
    try:
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        parts.append(str(version.value))
    except (OSError, AttributeError):
        parts.append("unknown")
    return " ".join(parts)


def _run_child(check: Check) -> records.Record:
    """The answer of the child process, or ``failure``: the reason why there is none."""
    if check.kind.device.type == "cuda":
        torch.cuda.empty_cache()  # the child needs memory of the same GPU
    asked = json.dumps({"device": str(check.kind.device), **check.request()})
    path = os.pathsep.join(dict.fromkeys([str(PACKAGE.parent), *filter(None, sys.path)]))
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*COMMAND, asked],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            status = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            return {"failure": f"it took longer than {check.seconds:g} s"}
        finally:
            _end(process)
        return _answer(status, output, errors)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the child and the compilers that it started, if they still run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answer(status: int, output: IO[bytes], errors: IO[bytes]) -> records.Record:
    output.seek(0)
    errors.seek(0)
    try:
        answer: dict[str, Any] = json.loads(output.read().splitlines()[-1]) if status == 0 else {}
    except (ValueError, IndexError):
        answer = {}
    if records.is_whole(answer):
        return answer
    lines = errors.read().decode(errors="replace").strip().splitlines()
    ended = f"signal {-status} ended it" if status < 0 else f"it ended with status {status}"
    return {"failure": f"{ended}: {lines[-1]}" if lines else ended}
