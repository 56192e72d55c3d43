"""What only a GPU can show. Here each test says why it is skipped; tools/gpu_check.sh runs them where there is one."""

import pytest
import torch

from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from tests.kernel_calls import reference, run
from tests.test_kernels import LANGUAGE, assert_same_bits, problem

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is False)"
)


def test_a_captured_step_follows_what_is_later_written_to_the_learning_rate_and_the_skip_flag() -> None:
    params, grads, _ = problem([4099, 1, 1024], torch.float32, "cuda")
    expected, momenta = [param.clone() for param in params], [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    lr = torch.tensor(1e-3, device="cuda")
    rest = {key: value for key, value in LANGUAGE.items() if key != "lr"}
    lion = ShardedLion(
        params, lr=lr, betas=(rest["beta1"], rest["beta2"]), weight_decay=rest["weight_decay"], kernel="fused"
    )
    lion.skip = torch.ones(1, dtype=torch.int32, device="cuda")
    lion.step()  # compiles, makes the state and copies its addresses to the device, without a change
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lion.step()
    for rate, skipped in ((1e-3, 0), (5e-4, 1), (2e-4, 0)):
        lr.fill_(rate)
        lion.skip.fill_(skipped)
        graph.replay()
        if not skipped:
            reference(expected, grads, momenta, lr=lr.item(), **rest)
    torch.cuda.synchronize()
    assert_same_bits(params, expected)


@pytest.mark.parametrize("size", [1, 1023, 1024, 2_000_003])
def test_the_compiled_kernel_has_the_bits_of_the_reference(size: int) -> None:
    from megatron_lion.kernels.triton_lion import lion_update_triton_

    lists = problem([size], torch.float32, "cuda")
    expected = [[tensor.clone() for tensor in tensors] for tensors in lists]
    for _ in range(2):
        run(lion_update_triton_, *lists, **LANGUAGE)
        reference(*expected, **LANGUAGE)
    for actual, right in zip(lists, expected, strict=True):
        assert_same_bits(actual, right)
