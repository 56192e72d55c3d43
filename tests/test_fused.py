"""What is the CPU kernel's own: its storage dtypes, threads, large tensors, and how it is compiled and kept."""

import ctypes
import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_lion import Lion
from megatron_lion.kernels import choose, compiler, describe, fused
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.step import StepKind, StepScalars, StepTensors
from tests.kernel_calls import reference, run
from tests.test_kernels import LANGUAGE, assert_same_bits, compare, problem, with_special_values

FP32, BF16 = torch.float32, torch.bfloat16
PLAIN = StepKind(torch.device("cpu"), FP32, FP32, FP32)


@pytest.mark.parametrize("dtypes", list(itertools.product([FP32, BF16], repeat=3)))
def test_each_mix_of_stored_dtypes_has_the_bits_of_the_reference(dtypes):
    lists = with_special_values(problem([4099, 3, 0, 5003], FP32))
    lists = [[t.to(dtype) for t in tensors] for tensors, dtype in zip(lists, dtypes, strict=True)]
    compare(lion_update_fused_, lists, **LANGUAGE)


@pytest.mark.parametrize("ties_are_apart", [False, True])
def test_every_bf16_rounding_case_has_the_bits_of_torchs_cast(ties_are_apart):
    """All exponents and signs with the halves around each tie, kept by a step of learning rate 0. Vectors without a tie
    and NaN are rounded in another way.
    """
    halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    patterns = torch.arange(1 << 16)[:, None] * (1 << 16) + halves
    patterns = (patterns.T if ties_are_apart else patterns).flatten()
    params = [patterns.to(torch.int32).view(FP32).clone()]
    copies = [torch.zeros(len(patterns), dtype=BF16)]
    lists = params, [torch.zeros_like(params[0])], [torch.zeros_like(params[0])]
    run(lion_update_fused_, *lists, model_copies=copies, **{**LANGUAGE, "lr": 0.0, "weight_decay": 0.0})
    assert_same_bits(copies, [params[0].to(BF16)])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ten_million_elements_on_any_number_of_threads_have_the_bits_of_the_reference(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(lion_update_fused_, problem([10_000_019, 262_144, 262_145, 1], FP32), steps=1, **LANGUAGE)
    finally:
        torch.set_num_threads(before)


def test_a_transposed_copy_is_written_in_its_own_order():
    params, grads, exp_avgs = ([t.view(20, 30) for t in ts] for ts in problem([600], FP32))
    copies = [torch.zeros(30, 20, dtype=BF16).t()]
    run(lion_update_fused_, params, grads, exp_avgs, model_copies=copies, **LANGUAGE)
    assert_same_bits(copies, [params[0].to(BF16)])


@pytest.mark.parametrize(
    ("device", "dtype", "copy"), [("meta", FP32, None), ("cpu", torch.float64, None), ("cpu", FP32, torch.float16)]
)
def test_unsupported_tensors_are_refused_before_anything_is_written(device, dtype, copy):
    """An address on a device would crash the process."""
    tensors = StepTensors(*([torch.ones(3, dtype=dtype, device=device)] for _ in range(3)))
    if copy is not None:
        tensors = StepTensors(tensors.masters, tensors.grads, tensors.exp_avgs, [torch.ones(3, dtype=copy)])
    with pytest.raises(ValueError, match="CPU kernel does not support"):
        lion_update_fused_(tensors, StepScalars(**LANGUAGE))
    assert device == "meta" or torch.equal(tensors.masters[0], torch.ones(3, dtype=dtype))


def test_the_kernel_is_called_with_the_types_of_its_source():
    code = compiler.SOURCE.read_text()
    returned, parameters = re.search(r'extern "C" (\w+) lion_cpu_update\(([^)]*)\)', code).groups()
    names = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "void": None}
    types = [ctypes.c_void_p if "*" in entry else names[entry.split()[0]] for entry in parameters.split(",")]
    for macros in ((), ("TELEMETRY",)):
        function = fused._kernel(*macros)
        assert function.restype is names[returned]
        assert function.argtypes == types


def test_autograd_still_sees_that_a_parameter_was_changed():
    """The kernel writes through an address; a backward pass that saved the old value must fail, not use the new one."""
    param = torch.ones(3, requires_grad=True)
    loss = (param * param).sum()
    run(lion_update_fused_, [param], [torch.ones(3)], [torch.zeros(3)], **LANGUAGE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The compiler module by its path: it needs nothing of torch, which takes seconds to import.
LOAD = "import runpy, sys; print(runpy.run_path(sys.argv[1])['load']().lion_cpu_update.__name__)"


def start(cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", LOAD, compiler.__file__]
    return subprocess.Popen(
        command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE, text=True
    )


def test_processes_that_compile_at_once_leave_one_whole_library(tmp_path):
    runs = [start(tmp_path) for _ in range(3)]
    assert [run.communicate(timeout=120)[0] for run in runs] == ["lion_cpu_update\n"] * 3
    (library,) = (tmp_path / "megatron_lion").iterdir()
    written = library.stat().st_mtime_ns
    assert start(tmp_path).communicate(timeout=120)[0] == "lion_cpu_update\n"
    assert library.stat().st_mtime_ns == written, "a later start compiled again"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and an empty folder for temporary files, for a process that has loaded no library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    compiler._load_once.cache_clear()
    yield tmp_path / "megatron_lion"
    compiler._load_once.cache_clear()
    assert not list((tmp_path / "tmp").rglob("*.so")), "a library is left"


@pytest.mark.parametrize(("command", "said"), [("/no/such/compiler", "no C\\+\\+ compiler"), ("false", "failed")])
def test_a_machine_without_a_working_compiler_is_told_why(cache, monkeypatch, command, said):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(compiler.CompilerUnavailable, match=said):
        compiler.load()


def test_a_compiler_that_fails_is_asked_once(cache, tmp_path, monkeypatch):
    script, log = tmp_path / "c++", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ntest "$1" = --version\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Lion([{"params": [param]} for param in params])
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
    assert len(log.read_text().splitlines()) == 2, "its version, and one attempt"
    assert describe("auto", [PLAIN]) == f"foreach ({script} failed: no message)"


def test_a_compiler_whose_message_is_not_utf_8_is_reported(cache, tmp_path, monkeypatch):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\ntest \"$1\" = --version && exit\nprintf 'kein \\374bersetzer\\n' >&2\nexit 1\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    assert describe("auto", [PLAIN]) == f"foreach ({script} failed: kein \ufffdbersetzer)"


def test_a_source_that_does_not_compile_leaves_nothing_behind(cache, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int broken(")
    with pytest.raises(compiler.CompilerUnavailable, match="failed"):
        compiler.load(source)
    assert not list(cache.iterdir())


@pytest.fixture
def quick(tmp_path):
    """A source that compiles in no time, and the path at which it was loaded."""
    source = tmp_path / "quick.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    return source


def in_the_way(cache, monkeypatch):
    cache.write_text("")
    return "File exists"


def writable_by_others(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)
    return f"{cache} is owned or writable by another user"


def of_another_user(cache, monkeypatch):
    cache.mkdir()
    if os.geteuid() == 0:
        os.chown(cache, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    return f"{cache} is owned or writable by another user"


def of_a_user_without_a_home(cache, monkeypatch):
    """As in a container that runs with any user id."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    return "this user has no home folder; set XDG_CACHE_HOME"


@pytest.mark.parametrize("spoil", [in_the_way, writable_by_others, of_another_user, of_a_user_without_a_home])
def test_a_cache_that_cannot_be_used_is_done_without(cache, quick, monkeypatch, spoil):
    said = spoil(cache, monkeypatch)
    assert compiler.load(quick).answer() == 42
    assert said in compiler.cache_problem(quick)
    assert not list((cache.parent / "tmp").iterdir())
    assert not (cache.is_dir() and list(cache.iterdir()))


def test_a_full_disk_of_the_cache_does_not_cost_the_kernel(cache, quick, monkeypatch):
    """The linker writes the library, so a full disk looks like a failed compiler. An empty file still has room."""
    here = compiler._compiler()
    linker = quick.with_name("c++")
    linker.write_text(
        f'#!/bin/sh\ncase "$*" in *" {cache}"*) echo "ld: No space left on device" >&2; exit 1;; esac\n'
        f'exec {here} "$@"\n'
    )
    linker.chmod(0o700)
    monkeypatch.setenv("CXX", str(linker))

    def no_space(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", no_space)
    assert compiler.load(quick).answer() == 42
    assert "No space left on device" in compiler.cache_problem(quick)
    assert not list(cache.iterdir())


def test_a_damaged_library_in_the_cache_is_replaced(cache, quick):
    cache.mkdir(mode=0o700)
    damaged = cache / f"quick-{compiler._key(quick, compiler._compiler(), *compiler.FLAGS)}.so"
    damaged.write_bytes(b"\x7fELF")
    damaged.chmod(0o700)
    assert compiler.load(quick).answer() == 42
    assert compiler.cache_problem(quick) is None
    assert list(cache.iterdir()) == [damaged]
    assert len(damaged.read_bytes()) > 1000


def test_a_library_that_another_user_could_have_written_is_replaced(cache, quick):
    assert compiler.load(quick).answer() == 42
    (library,) = cache.iterdir()
    code = library.read_bytes()
    library.unlink()  # it is loaded here: writing into it would change this process
    library.write_bytes(b"another user's code")
    library.chmod(0o766)
    compiler._load_once.cache_clear()
    assert compiler.load(quick).answer() == 42
    assert compiler.cache_problem(quick) is None
    assert library.read_bytes() == code
    assert library.stat().st_mode & 0o777 == 0o700


def test_no_home_and_no_temporary_folder_leaves_the_kernel_that_needs_no_compiler(cache, monkeypatch):
    of_a_user_without_a_home(cache, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(cache / "missing"))
    assert choose("auto", PLAIN) is lion_update_foreach_
    assert describe("auto", [PLAIN]).startswith("foreach (")


def test_another_compiler_flag_or_cpu_is_another_library(monkeypatch):
    here = compiler._compiler()
    keys = {compiler._key(compiler.SOURCE, here, *compiler.FLAGS)}
    keys.add(compiler._key(compiler.SOURCE, here, *compiler.FLAGS, "-DTELEMETRY"))
    monkeypatch.setattr(compiler, "_cpu", lambda: "another")
    keys.add(compiler._key(compiler.SOURCE, here, *compiler.FLAGS))
    assert len(keys) == 3


def test_products_are_not_contracted_on_a_machine_that_could():
    """Where c cancels to the last bit a fused multiply-add gives it another sign: the flag is what prevents it."""
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(10_001, generator=generator)
    lists = [[torch.zeros_like(m)], [-9 * m], [m]]
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    run(lion_update_fused_, *lists, **LANGUAGE)
    reference(*expected, **LANGUAGE)
    assert_same_bits(lists[0], expected[0])
