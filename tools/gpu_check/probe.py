"""The smallest Triton kernel: whether this machine can compile, load and launch one."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_one(pointer, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(pointer + index, tl.load(pointer + index, mask=index < size) + 1, mask=index < size)


def launch_problem() -> str | None:
    """Launch it on the GPU and look at the result. Returns what went wrong."""
    values = torch.arange(1000, dtype=torch.float32, device="cuda")
    try:
        _add_one[(4,)](values, 1000, BLOCK=256)
        torch.cuda.synchronize()
    except Exception as error:  # a compiler, a header, a library or the driver: whatever is wrong here
        return f"Triton cannot launch a kernel: {type(error).__name__}: {error}"
    right = torch.equal(values.cpu(), torch.arange(1000, dtype=torch.float32) + 1)
    return None if right else "a Triton kernel that adds 1 to 1,000 elements gave a wrong result"
