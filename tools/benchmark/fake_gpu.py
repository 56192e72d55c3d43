"""A stand-in for Triton's driver, on a machine without a GPU: kernels are compiled, launches are recorded and not made.

Everything before the driver is Triton's: its JIT, cache and binding of arguments. Tensors are on the CPU.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class RecordingDriver:
    """One GPU of compute capability ``arch`` (90 is 9.0)."""

    def __init__(self, arch: int = 90) -> None:
        self.arch = arch
        self.launches: list[tuple[tuple[int, int, int], tuple[Any, ...]]] = []
        """Grid and arguments of each launch."""
        self.utils = self

    def install(self) -> "RecordingDriver":
        """Make this the driver of this process."""
        driver.set_active(self)
        return self

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """The function that Triton calls for each launch of one compiled kernel."""

        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            self.launches.append(((x, y, z), rest[4:]))  # packed metadata, launch metadata and two hooks come first

        return launch

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Those that Triton asks for."""
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Its only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any number."""
        return 1000
