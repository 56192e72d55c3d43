"""What only a GPU can show. Here each test says why it is skipped; tools/gpu_check.sh runs them where there is one."""

import pytest
import torch
from test_kernels import LANGUAGE, assert_same_bits, problem

from megatron_lion.update import lion_update_

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is False)"
)


def test_a_captured_step_follows_what_is_later_written_to_the_learning_rate_and_the_skip_flag() -> None:
    from megatron_lion.kernels.triton_lion import lion_update_triton_

    lists = problem([4099, 1, 1024], torch.float32, "cuda")
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    lr, skip = torch.tensor(1e-3, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    rest = {key: value for key, value in LANGUAGE.items() if key != "lr"}

    def step() -> None:
        lion_update_triton_(*lists, lr=lr, skip=skip, **rest)

    skip.fill_(1)  # compile, and warm up, without a change
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for rate, skipped in ((1e-3, 0), (5e-4, 1), (2e-4, 0)):
        lr.fill_(rate)
        skip.fill_(skipped)
        graph.replay()
        if not skipped:
            lion_update_(*expected, lr=rate, **rest)
    torch.cuda.synchronize()
    for actual, right in zip(lists, expected, strict=True):
        assert_same_bits(actual, right)


@pytest.mark.parametrize("size", [1, 1023, 1024, 2_000_003])
def test_the_compiled_kernel_has_the_bits_of_the_reference(size: int) -> None:
    from megatron_lion.kernels.triton_lion import lion_update_triton_

    lists = problem([size], torch.float32, "cuda")
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    for _ in range(2):
        lion_update_triton_(*lists, **LANGUAGE)
        lion_update_(*expected, **LANGUAGE)
    for actual, right in zip(lists, expected, strict=True):
        assert_same_bits(actual, right)
