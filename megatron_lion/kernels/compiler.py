"""Compile C++ sources once with the system's compiler, and cache the libraries for later runs."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("lion_cpu.cpp")
# No contraction: a fused multiply-add rounds once where update.py rounds twice. The two -fno flags drop floating-point
# exceptions and errno, which nobody reads, so that comparisons can be vectorized; no value changes.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 120


class CompilerUnavailable(RuntimeError):
    """The library could not be made; the message has the reason."""


class _Outcome(NamedTuple):
    library: ctypes.CDLL | None
    problem: str
    """why there is no library, or why it is not cached; else empty"""


def load(source: Path = SOURCE, *macros: str) -> ctypes.CDLL:
    """Return the library compiled from ``source`` with ``macros`` defined, from the cache if possible.

    The cache is ``$XDG_CACHE_HOME/megatron_lion`` (``~/.cache/megatron_lion``). The file's name is a hash of the source
    and the headers next to it, the compiler, the flags and the CPU. Several processes may call this at once: each
    compiles in its own temporary folder and renames a copy into the cache, so that no process sees a partial library.
    If the cache cannot be written, or another user could have written it, the library is loaded from that folder, for
    this process only (:func:`cache_problem` says why). A compiler that fails runs once per process. Issues no
    collective.

    Raises:
        CompilerUnavailable: no compiler, or one that fails; the message names it and has its error.
    """
    outcome = _load_once(source, *macros)
    if outcome.library is None:
        raise CompilerUnavailable(outcome.problem)
    return outcome.library


def problem(source: Path = SOURCE) -> str | None:
    """Why ``source`` has no library on this machine, or None. Compiles it if needed."""
    try:
        load(source)
    except CompilerUnavailable as error:
        return str(error)
    return None


def cache_problem(source: Path = SOURCE, *macros: str) -> str | None:
    """Why the library of :func:`load` is compiled again in each process, or None. Raises as :func:`load` does."""
    load(source, *macros)
    return _load_once(source, *macros).problem or None


@functools.cache
def _load_once(source: Path, *macros: str) -> _Outcome:
    """Compile and load ``source``. A failure is a value, because ``functools.cache`` keeps no exception."""
    try:
        return _load(source, (*FLAGS, *(f"-D{macro}" for macro in macros)))
    except (CompilerUnavailable, OSError) as error:
        return _Outcome(None, str(error))


def _load(source: Path, flags: Sequence[str]) -> _Outcome:
    compiler = _compiler()
    name = f"{source.stem}-{_key(source, compiler, *flags)}.so"
    cached, problem = None, ""
    try:
        cached = cache_folder() / name
        if cached.is_file() and is_private(cached):
            return _Outcome(ctypes.CDLL(str(cached)), "")
    except OSError as error:
        problem = str(error)
    with tempfile.TemporaryDirectory(prefix="megatron_lion-") as folder:  # a loaded library no longer needs its file
        library = Path(folder) / name
        _compile([compiler, *flags, str(source), "-o", str(library)])
        if cached is not None:  # also over a library that did not load, which may be damaged
            try:
                _copy(library, cached)
                return _Outcome(ctypes.CDLL(str(cached)), "")
            except OSError as error:
                problem = str(error)
        return _Outcome(ctypes.CDLL(str(library)), problem)


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
    """The CPU that ``-march=native`` depends on. Machines with different CPUs may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    described = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(described))


def cache_folder() -> Path:
    """The cache folder, created if it is missing. Raises OSError if it cannot be created or trusted."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no HOME, and a user id without an entry in passwd
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME") from error
    folder = (base / "megatron_lion").resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_private(folder):
        raise PermissionError(f"{folder} is owned or writable by another user")
    return folder


def is_private(path: Path) -> bool:
    """Whether only this user, or root, could have written ``path``."""
    status = path.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _compile(command: Sequence[str]) -> None:
    """Run ``command``. Raises CompilerUnavailable with its first message if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerUnavailable(f"{command[0]} failed: {error}") from error
    if done.returncode != 0:
        raise CompilerUnavailable(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")


def _copy(library: Path, cached: Path) -> None:
    """Copy ``library`` to ``cached`` with an atomic rename. Raises OSError if the disk is full."""
    handle, name = tempfile.mkstemp(suffix=".so", prefix=f"{cached.stem}-", dir=cached.parent)
    os.close(handle)
    partial = Path(name)
    try:
        shutil.copyfile(library, partial)
        partial.chmod(0o700)
        partial.replace(cached)
    finally:
        partial.unlink(missing_ok=True)
