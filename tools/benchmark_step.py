"""How long one optimizer step takes, and how much of the memory's speed it uses: this package's Lion beside its peers.

All candidates step the same parameters, each with state of its own, in turn, round after round in one process, and
medians are reported, so that a machine that slows down slows all of them. The limit is a pass in place that reads
gradient, parameter and momentum and writes parameter and momentum with one addition each: what the memory allows where
the lines that are written have been read anyway. Peers that are not installed are left out, with the reason.

    python tools/benchmark_step.py --threads 2 --rounds 9 --json runs/step.json --plot runs/step.png
"""

import argparse
import ctypes
import importlib
import json
import platform
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lion import Lion, LionError
from megatron_lion.kernels import compiler
from megatron_lion.kernels.fused import lion_update_fused_

HYPER = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.1}
MODELS = {"gpt2-small": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280)}
VOCABULARY, POSITIONS = 50_257, 1024

STREAM = r"""
#include <cstdint>
extern "C" void stream(int64_t tensors, float *const *pointers, const int64_t *counts, int threads) {
    const int64_t chunk = 262144;
    int64_t chunks = 0, next = 0;
    for (int64_t t = 0; t < tensors; ++t) chunks += (counts[t] + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads)
    for (int64_t tensor = 0, before = 0;;) {
        int64_t mine;
#pragma omp atomic capture
        mine = next++;
        if (mine >= chunks) break;
        for (; mine >= before + (counts[tensor] + chunk - 1) / chunk; ++tensor)
            before += (counts[tensor] + chunk - 1) / chunk;
        const int64_t start = (mine - before) * chunk;
        const int64_t count = counts[tensor] - start < chunk ? counts[tensor] - start : chunk;
        float *__restrict param = pointers[3 * tensor] + start, *__restrict momentum = pointers[3 * tensor + 2] + start;
        const float *__restrict grad = pointers[3 * tensor + 1] + start;
        for (int64_t i = 0; i < count; ++i) {
            param[i] += grad[i];
            momentum[i] += grad[i];
        }
    }
}
"""


@dataclass
class Candidate:
    """One way to step. ``bytes`` are read and written per parameter, counted from its passes; None where unknown."""

    name: str
    state: str
    bytes: float | None
    step: Callable[[], object]


@dataclass
class Row:
    """What was measured of one candidate; ``share`` is the limit's time for as many bytes over this one's."""

    name: str
    state: str
    milliseconds: float
    bytes: float | None
    gigabytes_per_second: float | None
    share_of_limit: float | None
    ratio_to_fastest_peer: float | None


def shapes(name: str) -> list[tuple[int, ...]]:
    """The parameters of a GPT-2 with tied embeddings, in the model's order: gpt2-small has 148, 124.4M elements."""
    layers, width = MODELS[name]
    layer = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(VOCABULARY, width), (POSITIONS, width), *(layer * layers), (width,), (width,)]


def parameters(sizes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Parameters with gradients of a usual size: one set, which every candidate steps."""
    params = [torch.nn.Parameter(torch.randn(size) * 1e-2) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def gradient(param: torch.nn.Parameter) -> Tensor:
    """The gradient that :func:`parameters` gave."""
    assert param.grad is not None
    return param.grad


def limit(params: list[torch.nn.Parameter]) -> Candidate:
    """The streaming pass in place over parameters, gradients and momenta: 12 bytes read and 8 written per parameter."""
    rows = [(param.detach(), gradient(param), torch.zeros_like(param)) for param in params]
    addresses = array("Q", [tensor.data_ptr() for row in rows for tensor in row])
    counts = array("q", [row[0].numel() for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stream.cpp"
        source.write_text(STREAM)
        library = compiler.load(source)

    def step() -> object:
        arguments = (ctypes.c_void_p(values.buffer_info()[0]) for values in (addresses, counts))
        library.stream(ctypes.c_int64(len(rows)), *arguments, ctypes.c_int(torch.get_num_threads()))
        return rows  # keeps the tensors

    return Candidate("streaming limit", "-", 20, step)


def ours(params: list[torch.nn.Parameter]) -> list[Candidate]:
    """This package's kernels as ``Lion``, and the fused kernel in the precisions that it stores."""
    made = []
    for kernel, per_parameter in (("fused", 20), ("foreach", None)):
        optimizer = Lion(params, **HYPER, kernel=kernel)
        made.append(Candidate(f"megatron-lion {kernel}", "fp32 momentum", per_parameter, optimizer.step))
    hyper = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    masters, grads = [param.detach() for param in params], [gradient(param) for param in params]
    momenta = [torch.zeros_like(master) for master in masters]
    copies = [tensor.bfloat16() for tensor in masters]
    made.append(
        Candidate(
            "megatron-lion fused, writing bf16 parameters",
            "fp32 master and momentum",
            22,
            lambda: lion_update_fused_(masters, grads, momenta, copies=copies, **hyper),
        )
    )
    half = [[tensor.bfloat16() for tensor in group] for group in (grads, momenta)]
    made.append(
        Candidate(
            "megatron-lion fused, bf16 gradient and momentum",
            "fp32 master, bf16 momentum",
            16,
            lambda: lion_update_fused_(masters, *half, copies=copies, **hyper),
        )
    )
    return made


def compiled_foreach(params: list[torch.nn.Parameter]) -> Callable[[], object]:
    """A foreach Lion under torch.compile, the way microsoft/dion's scalar_opts.py has it."""
    grads, momenta = [gradient(param) for param in params], [torch.zeros_like(param) for param in params]
    values = [param.detach() for param in params]

    @torch.compile(fullgraph=True)
    def update(values: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        signs = torch._foreach_sign(torch._foreach_lerp(momenta, grads, 1 - 0.9))
        torch._foreach_lerp_(momenta, grads, 1 - 0.95)
        torch._foreach_mul_(values, 1 - HYPER["lr"] * HYPER["weight_decay"])
        torch._foreach_add_(values, signs, alpha=-HYPER["lr"])

    return lambda: update(values, grads, momenta)


def peers(params: list[torch.nn.Parameter], names: list[str]) -> tuple[list[Candidate], dict[str, str]]:
    """The peers among ``names`` that could be built and stepped here, and why each other could not."""
    made, missing = [], {}
    for name in names:
        state, per_parameter, build = PEERS[name]
        try:
            step = build(params)
            step()
        except Exception as error:  # whatever a peer raises where it does not fit: that is the finding
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            made.append(Candidate(name, state, per_parameter, step))
    return made, missing


def external(module: str, name: str, **options: object) -> Callable[[list[torch.nn.Parameter]], Callable[[], object]]:
    """A builder of the optimizer ``name`` of a package that may not be installed."""
    return lambda params: getattr(importlib.import_module(module), name)(params, **{**HYPER, **options}).step


PEERS: dict[str, tuple[str, float | None, Callable[[list[torch.nn.Parameter]], Callable[[], object]]]] = {
    "torch AdamW fused": ("two moments", 28, external("torch.optim", "AdamW", fused=True)),
    "torch AdamW foreach": ("two moments", None, external("torch.optim", "AdamW", foreach=True)),
    "torch SGD fused": (
        "fp32 momentum",
        20,
        lambda params: torch.optim.SGD(params, lr=1e-6, momentum=0.9, weight_decay=0.1, fused=True).step,
    ),
    "compiled foreach Lion": ("fp32 momentum", 20, compiled_foreach),
    "emerging-optimizers Lion": ("fp32 momentum", 36, external("emerging_optimizers.scalar_optimizers", "Lion")),
    "lion-pytorch eager": ("fp32 momentum", 76, external("lion_pytorch", "Lion")),
    "lion-pytorch foreach": ("fp32 momentum", 60, external("lion_pytorch.foreach", "Lion")),
    "pytorch_optimizer Lion": ("fp32 momentum", 68, external("pytorch_optimizer", "Lion", foreach=True)),
    "DeepSpeed CPULion": ("fp32 momentum", 20, external("deepspeed.ops.lion", "DeepSpeedCPULion")),
    "bitsandbytes Lion": ("fp32 momentum", None, external("bitsandbytes.optim", "Lion32bit")),
}

# These compile for a minute or more at their first step, so they are measured when asked for.
SLOW_TO_BUILD = ("compiled foreach Lion", "DeepSpeed CPULion")
PEERS_HELP = f"'all', or names of {', '.join(PEERS)}; without it all but {' and '.join(SLOW_TO_BUILD)}"


def measure(candidates: list[Candidate], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, stepped in turn; one round before that is not counted."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in range(rounds + 1):
        for candidate in candidates:
            start = time.perf_counter()
            candidate.step()
            if number >= 1:
                times[candidate.name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def rows(candidates: list[Candidate], times: dict[str, float], numel: int) -> list[Row]:
    """The table, fastest first; the ratio compares with the fastest candidate of the same state that is not ours."""
    per_byte = times["streaming limit"] / 20
    table = []
    for one in sorted(candidates, key=lambda candidate: times[candidate.name]):
        rivals = [
            times[other.name]
            for other in candidates
            if other.state == one.state and other is not one and not other.name.startswith("megatron-lion")
        ]
        speed = None if one.bytes is None else one.bytes * numel / times[one.name] / 1e6
        share = None if one.bytes is None else per_byte * one.bytes / times[one.name]
        ratio = min(rivals) / times[one.name] if rivals else None
        table.append(Row(one.name, one.state, times[one.name], one.bytes, speed, share, ratio))
    return table


def markdown(table: list[Row]) -> str:
    """The table as Markdown."""

    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        "| | state | ms | bytes per parameter | GB/s | share of the limit | times as fast as the fastest peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        numbers = (row.milliseconds, row.bytes, row.gigabytes_per_second, row.share_of_limit, row.ratio_to_fastest_peer)
        cells = " | ".join(show(value, digits) for value, digits in zip(numbers, (1, 0, 1, 2, 2), strict=True))
        lines.append(f"| {row.name} | {row.state} | {cells} |")
    return "\n".join(lines)


def plot(table: list[Row], path: Path) -> None:
    """A bar for each row, the streaming limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.4 * len(table) + 1.2), layout="constrained")
    axes.barh([row.name for row in table], [row.milliseconds for row in table])
    axes.axvline(next(row.milliseconds for row in table if row.state == "-"), color="black", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("ms per step, median; dashed: streaming limit for 20 bytes per parameter")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def machine() -> str:
    """The CPU, and the versions that matter."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=tuple(MODELS), default="gpt2-small", help="whose parameters (%(default)s)")
    parser.add_argument("--numel", type=int, help="one flat tensor of so many elements instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that are counted (%(default)s)")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME", help=PEERS_HELP)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--plot", type=Path, help="draw the rows there as well")
    args = parser.parse_args()
    args.peers = args.peers or [name for name in PEERS if name not in SLOW_TO_BUILD]
    args.peers = list(PEERS) if args.peers == ["all"] else args.peers
    if unknown := set(args.peers) - set(PEERS):
        raise LionError(f"--peers {', '.join(sorted(unknown))}: unknown. Valid: {', '.join(PEERS)}")
    torch.set_num_threads(args.threads)
    sizes = [(args.numel,)] if args.numel else shapes(args.shapes)
    numel = sum(torch.Size(size).numel() for size in sizes)
    params = parameters(sizes)
    made, missing = peers(params, args.peers)
    candidates = [limit(params), *ours(params), *made]
    table = rows(candidates, measure(candidates, args.rounds), numel)
    print(f"{len(sizes)} tensors, {numel:,} elements, fp32; {machine()}; {args.rounds} rounds, medians\n")
    print(markdown(table))
    for name, reason in missing.items():
        print(f"\nNot measured: {name} ({reason})")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "numel": numel, "rows": [asdict(row) for row in table], "missing": missing}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(table, args.plot)


if __name__ == "__main__":
    try:
        main()
    except LionError as error:
        sys.exit(f"benchmark_step: {error}")
