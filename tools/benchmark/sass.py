"""Compile a Triton kernel for a GPU that is absent, and read the machine code.

No driver is needed: ``triton.compile`` with a ``GPUTarget``, and the disassemblers in Triton's wheel. Triton must have
been imported without ``TRITON_INTERPRET``.
"""

import collections
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
LABEL = re.compile(r"^(\.L_x_\d+|\$\S+|\S+):\s*$")


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: set[str], arch: int, **options: Any
) -> Any:
    """Compile ``kernel`` as a launch would for compute capability ``arch`` (90 is 9.0), without contraction.

    ``types`` has the Triton type of each argument that is not in ``constants``. Those in ``aligned`` are multiples
    of 16. ``options`` are Triton's.
    """
    positions = [index for index, name in enumerate(kernel.arg_names) if name in aligned]
    if "constants" in inspect.signature(ASTSource.__init__).parameters:  # Triton before 3.3
        from triton.backends.compiler import AttrsDescriptor

        source = ASTSource(kernel, types, constants, AttrsDescriptor.from_hints(dict.fromkeys(positions, 16)))
    else:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in positions})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, **options})


@dataclass(frozen=True)
class Facts:
    """What the compiled code of one variant has."""

    registers: int
    spills: int
    """Loads and stores of registers in local memory."""
    contracted: int
    """Fused multiply-adds in the PTX, which round once where a product and a sum round twice."""
    fma: int
    """The same in the machine code. Correctly rounded divisions and roots consist of them."""
    flushed: int
    """Instructions in the PTX that flush denormals."""
    widths: dict[int, int]
    """Accesses of global memory by their bits per thread, in the PTX."""
    vectors: int
    """Those of several numbers."""
    executed: int
    """Instructions that a thread executes, without slow paths that are entered only for special values."""
    loads_after_stores: int
    """Loads of tensors that come after a store. No barrier separates them if they are in different threads."""


def facts(compiled: Any) -> Facts:
    """Read the compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (_output(*command, file.name) for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    ptx = compiled.asm["ptx"]
    program = Program(sass)
    accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)", ptx)
    return Facts(
        registers=int(registers[1]),
        spills=sum(op.startswith(("LDL", "STL")) for _, op, _ in program.code),
        contracted=len(re.findall(r"\bfma\.rn", ptx)),
        fma=sum(op.startswith(("FFMA", "DFMA")) for _, op, _ in program.code),
        flushed=len(re.findall(r"\.ftz", ptx)),
        widths=dict(collections.Counter(int(count or 1) * int(bits) for count, bits in accesses)),
        vectors=sum(bool(count) for count, _ in accesses),
        executed=program.executed(),
        loads_after_stores=sum(_loads_after_stores(compiled.asm["ttgir"])),
    )


def _output(tool: str, *arguments: str) -> str:
    done = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def _loads_after_stores(ttgir: str) -> Iterator[bool]:
    stored = False
    for line in ttgir.splitlines():
        stored = (stored or "tt.store " in line) and "} else {" not in line
        yield stored and " = tt.load " in line and "tensor<" in line


class Program:
    """Machine code as nvdisasm prints it."""

    def __init__(self, text: str) -> None:
        self.code: list[tuple[str | None, str, str]] = []  # predicate, instruction, arguments
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if found := LABEL.match(line):
                self.labels[found[1]] = len(self.code)
            elif found := INSTRUCTION.match(line):
                self.code.append((found[1], found[2], found[3]))

    def executed(self, at: int | None = None) -> int:
        """Instructions that a thread executes from the entry, or from ``at``, to the exit or the return.

        A conditional branch is taken if it jumps over a call: such calls are the slow paths of divisions and roots.
        No other conditional branch or exit is taken. Loops are not followed back.
        """
        at = min(index for name, index in self.labels.items() if "kernel" in name) if at is None else at
        count = 0
        while at < len(self.code):
            predicate, instruction, arguments = self.code[at]
            name = instruction.split(".")[0]
            count += 1
            if predicate is None and name in ("EXIT", "RET"):
                break
            target = self.labels.get(found[1]) if (found := re.search(r"`\(([^)]+)\)", arguments)) else None
            if name == "CALL" and target is not None and predicate is None:
                count += self.executed(target)
            if name == "BRA" and target is not None and target > at:
                is_conditional = predicate is not None or "UP" in arguments
                over_a_call = any(op.startswith("CALL") for _, op, _ in self.code[at + 1 : target])
                if not is_conditional or over_a_call:
                    at = target
                    continue
            at += 1
        return count
