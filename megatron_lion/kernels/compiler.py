"""Compile the CPU kernel once with the system's C++ compiler, and keep it for the runs that follow."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("lion_cpu.cpp")
# No contraction: a fused multiply-add rounds once where update.py rounds twice. The two -fno flags give up
# floating-point exceptions and errno, which nobody reads, so that comparisons can be vectorised; no value changes.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 120


class CompilerUnavailable(RuntimeError):
    """There is no library, for the reason in the message."""


@functools.cache
def load(source: Path = SOURCE, *defined: str) -> ctypes.CDLL:
    """The library compiled from ``source`` with the macros ``defined``, from the cache where it is there.

    It is cached in ``$XDG_CACHE_HOME/megatron_lion`` (``~/.cache/megatron_lion``) under a name made of the source and
    the headers beside it, the compiler, the flags and the CPU. Several processes may call this at once: each compiles
    to a file of its own and renames it, so that no process sees half a library. Where the cache cannot be written the
    library lives in a temporary folder, and the next run compiles again. Issues no collective.

    Raises:
        CompilerUnavailable: no compiler, or one that fails; the message says which, and what it said.
    """
    compiler, flags = _compiler(), (*FLAGS, *(f"-D{macro}" for macro in defined))
    library = _cache_folder() / f"{source.stem}-{_key(source, compiler, *flags)}.so"
    if not library.is_file():
        library = _compile([compiler, *flags], source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilerUnavailable(f"{library} cannot be loaded: {error}") from error


def _compiler() -> str:
    asked = os.environ.get("CXX")
    names = (asked,) if asked else COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise CompilerUnavailable(f"no C++ compiler on PATH ({', '.join(names)}; the variable CXX names another)")


def _key(source: Path, compiler: str, *flags: str) -> str:
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerUnavailable(f"{compiler} --version failed: {error}") from error
    code = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*code, compiler.encode(), version, " ".join(flags).encode(), _cpu().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _cpu() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by machines with different CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    described = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(described))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_lion"


def _compile(command: list[str], source: Path, library: Path) -> Path:
    """Compile ``source`` into ``library``, or a temporary file where that cannot be written. Returns the file."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".so", prefix=f"{library.stem}-", dir=library.parent)
    except OSError:
        handle, name = tempfile.mkstemp(suffix=".so", prefix=f"{library.stem}-")
        library = Path(name)
    os.close(handle)
    partial = Path(name)
    try:
        done = subprocess.run([*command, str(source), "-o", name], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode != 0:
            raise CompilerUnavailable(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        partial.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerUnavailable(f"{command[0]} failed: {error}") from error
    finally:
        if partial != library:
            partial.unlink(missing_ok=True)
    return library
