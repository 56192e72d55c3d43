"""This package's Lion, in every kernel and every precision that it stores."""

import torch

from benchmark.measure import Candidate
from benchmark.peers import FP32_MOMENTUM, HYPER
from benchmark.shapes import gradient
from benchmark.traffic import READ, UPDATE, WRITE, Stream, counted, streams_of
from megatron_lion import Lion
from megatron_lion.kernels import choose

RULE = {"lr": HYPER["lr"], "beta1": HYPER["betas"][0], "beta2": HYPER["betas"][1], "weight_decay": 0.1}


def candidates(params: list[torch.nn.Parameter]) -> list[Candidate]:
    """Ours on ``params``, in the peers' precision, then in the precisions of mixed training."""
    return [*in_fp32(params), *in_mixed_precision(params)]


def in_fp32(params: list[torch.nn.Parameter]) -> list[Candidate]:
    """fp32 parameters, gradients and momentum, as the peers have them: fused in one pass, foreach in several."""
    made = []
    for kernel in ("fused", "foreach"):
        optimizer = Lion(params, **HYPER, kernel=kernel)
        optimizer.step()
        name = f"megatron-lion {kernel}"
        if kernel == "fused":
            made.append(Candidate(name, FP32_MOMENTUM, optimizer.step, streams=streams_of(optimizer)))
        else:
            made.append(Candidate(name, FP32_MOMENTUM, optimizer.step, counted(optimizer.step)))
    return made


def in_mixed_precision(params: list[torch.nn.Parameter]) -> list[Candidate]:
    """The fused kernel on fp32 masters, writing bf16 parameters, with gradient and momentum in fp32 and in bf16."""
    masters, grads = [param.detach() for param in params], [gradient(param) for param in params]
    momenta, copies = [torch.zeros_like(master) for master in masters], [master.bfloat16() for master in masters]
    made = []
    for title, state, dtype in (
        ("writing bf16 parameters", "fp32 master and momentum", torch.float32),
        ("bf16 gradient and momentum, writing bf16 parameters", "fp32 master, bf16 momentum", torch.bfloat16),
    ):
        g, m = ([tensor.to(dtype) for tensor in tensors] for tensors in (grads, momenta))
        made.append(_of_kernel(f"megatron-lion fused, {title}", state, masters, g, m, copies))
    return made


def _of_kernel(name: str, state: str, *roles: list[torch.Tensor]) -> Candidate:
    params, grads, momenta, copies = roles
    update = choose("fused", params, grads, momenta)
    streams = [Stream(grads, READ), Stream(params, UPDATE), Stream(momenta, UPDATE), Stream(copies, WRITE)]
    return Candidate(name, state, lambda: update(params, grads, momenta, copies=copies, **RULE), streams=streams)
