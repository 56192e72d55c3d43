"""What is the CPU kernel's own: its storage dtypes, threads, large tensors, and how it is compiled and kept."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lion.kernels import compiler
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.update import lion_update_
from tests.test_kernels import LANGUAGE, assert_same_bits, compare, problem, with_special_values

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtypes", list(itertools.product([FP32, BF16], repeat=3)))
def test_each_mix_of_stored_dtypes_has_the_bits_of_the_reference(dtypes):
    lists = with_special_values(problem([4099, 3, 0, 5003], FP32))
    lists = [[t.to(dtype) for t in tensors] for tensors, dtype in zip(lists, dtypes, strict=True)]
    compare(lion_update_fused_, lists, **LANGUAGE)


def test_every_bf16_rounding_case_has_the_bits_of_torchs_cast():
    """All exponents and signs with the halves around each tie, kept by a step of learning rate 0."""
    halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    patterns = (torch.arange(1 << 16)[:, None] * (1 << 16) + halves).flatten()
    params = [patterns.to(torch.int32).view(FP32).clone()]
    copies = [torch.zeros(len(patterns), dtype=BF16)]
    lists = params, [torch.zeros_like(params[0])], [torch.zeros_like(params[0])]
    lion_update_fused_(*lists, copies=copies, **{**LANGUAGE, "lr": 0.0, "weight_decay": 0.0})
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
    lion_update_fused_(params, grads, exp_avgs, copies=copies, **LANGUAGE)
    assert_same_bits(copies, [params[0].to(BF16)])


def test_tensors_of_another_size_are_refused_before_anything_is_written():
    params, grads, exp_avgs = problem([4, 6], FP32)
    before = [param.clone() for param in params]
    with pytest.raises(ValueError, match="differ in size"):
        lion_update_fused_(params, grads, exp_avgs[::-1], **LANGUAGE)
    assert_same_bits(params, before)


def test_autograd_still_sees_that_a_parameter_was_changed():
    """The kernel writes through an address; a backward pass that saved the old value must fail, not use the new one."""
    param = torch.ones(3, requires_grad=True)
    loss = (param * param).sum()
    lion_update_fused_([param], [torch.ones(3)], [torch.zeros(3)], **LANGUAGE)
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


@pytest.mark.parametrize(("command", "said"), [("/no/such/compiler", "no C\\+\\+ compiler"), ("false", "failed")])
def test_a_machine_without_a_working_compiler_is_told_why(tmp_path, monkeypatch, command, said):
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(compiler.CompilerUnavailable, match=said):
        compiler.load.__wrapped__()


def test_a_source_that_does_not_compile_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int broken(")
    with pytest.raises(compiler.CompilerUnavailable, match="failed"):
        compiler.load.__wrapped__(source)
    assert not list((tmp_path / "megatron_lion").iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "megatron_lion").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.load.__wrapped__().lion_cpu_update


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
    lion_update_fused_(*lists, **LANGUAGE)
    lion_update_(*expected, **LANGUAGE)
    assert_same_bits(lists[0], expected[0])
