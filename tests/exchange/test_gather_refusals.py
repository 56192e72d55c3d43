"""--lion-gather signs is refused where Lion is built, as on the command line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lion.config import LionError, LionOptions
from megatron_lion.integration.exchange import refusals


def build(monkeypatch: pytest.MonkeyPatch, *, config: Any = None, devices: tuple[str, ...] = (), **chunk: Any) -> None:
    """Check one model chunk on as many ranks as there are ``devices``."""

    def gathered(found: list[str], mine: str) -> None:
        found[:] = devices or [mine]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: max(1, len(devices)))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    model = torch.nn.Linear(2, 2)
    for name, value in chunk.items():
        setattr(model, name, value)
    refusals.refuse_where_built(LionOptions(gather="signs"), config or SimpleNamespace(), [model])


def test_a_plain_model_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, config=SimpleNamespace(cuda_graph_impl="none", enable_cuda_graph=False))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"config": SimpleNamespace(overlap_param_gather_with_optimizer_step=True)}, "--overlap-param-gather-with-opt"),
        ({"config": SimpleNamespace(cuda_graph_impl="full_iteration")}, "--cuda-graph-impl full_iteration"),
        ({"config": SimpleNamespace(enable_cuda_graph=True)}, "--enable-cuda-graph"),
        ({"config": SimpleNamespace(external_cuda_graph=True)}, "--external-cuda-graph"),
        ({"ddp_config": SimpleNamespace(fp8_param_gather=True)}, "--fp8-param-gather"),
        ({"ddp_config": SimpleNamespace(fp4_param_gather=True)}, "--fp4-param-gather"),
        ({"devices": ("NVIDIA H100", "NVIDIA A100", "NVIDIA H100")}, r"a mix of devices \(NVIDIA A100, NVIDIA H100\)"),
    ],
)
def test_what_signs_are_not_supported_with_is_refused(
    monkeypatch: pytest.MonkeyPatch, what: dict[str, Any], said: str
) -> None:
    with pytest.raises(LionError, match=f"--lion-gather signs is not supported with {said}.*Use --lion-gather params"):
        build(monkeypatch, **what)
