"""The report of the rehearsed ranks, as text."""

import math
from typing import Any

from megatron_lion.integration.rehearsal.one_rank import RankReport

GIB = 1 << 30
KINDS = ("weights", "gradients", "momentum", "masters")
NO_ACTIVATIONS = "activations are not included: --steps 1 measures them"


def needed(report: RankReport) -> int:
    """Bytes that a rank needs on its GPU, with activations if steps have measured them."""
    return report.sizes["on_device"] + _activations(report)


def is_too_large(reports: list[RankReport], gpu_memory: float | None) -> bool:
    """Whether a rank needs more than ``gpu_memory`` GiB."""
    return gpu_memory is not None and max(map(needed, reports)) > gpu_memory * GIB


def text(reports: list[RankReport], estimate: dict[str, int], gpu_memory: float | None) -> str:
    """The whole report. ``estimate`` has bytes of weights, gradients and state on the fullest rank; may be empty."""
    first = reports[0]
    layout = " x ".join(f"{name} {size}" for name, size in first.layout.items() if size > 1) or "one rank"
    lines = [
        f"rehearsed {len(reports)} of {first.world_size:,} ranks ({layout}), {first.optimizer}. This is not training: "
        "the other ranks do not exist",
        "",
        *_table(reports),
        *_against(reports, estimate),
        "",
    ]
    for report in _by_stage(reports):
        lines += [_buckets(report), *_lines(report.traffic)]
        if report.steps:
            sent = _lines(report.steps["messages"])
            lines += [f"rank {report.rank:,}: everything sent in step {report.steps['steps']}, counted:", *sent]
    lines += [
        *([] if first.steps else ["  activations that other groups send are not included: --steps 1 counts them"]),
        *filter(None, (_checkpoint(reports), _loaded(first))),
        *(f"replaced: {replaced}" for replaced in first.replaced),
    ]
    if first.real_memory:
        lines.append(f"weights in real memory: {first.real_memory}. Otherwise they are on torch's meta device")
    if first.steps:
        lines.append(
            f"{first.steps['steps']} steps on random tokens ran in {first.steps['seconds']:.1f} s (no training)"
        )
    return "\n".join([*lines, "", _memory(reports, gpu_memory)])


def _table(reports: list[RankReport]) -> list[str]:
    head = ("rank", "stage", "parameters", *KINDS, "total", "start-up", "host memory")
    rows = [
        (
            f"{report.rank:,}",
            f"{report.stage + 1} of {report.layout['PP']}",
            f"{report.sizes['parameters']:,}",
            *(size(report.sizes[kind]) for kind in KINDS),
            size(report.sizes["on_device"]),
            f"{sum(report.seconds.values()):.1f} s",
            size(report.host_bytes),
        )
        for report in reports
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    totals = [(report.sizes["on_device"], report.rank) for report in reports]
    (large, most), (small, least) = max(totals), min(totals)
    return [*table, f"largest: rank {most:,}, {size(large)}; smallest: rank {least:,}, {size(small)}"]


def _against(reports: list[RankReport], estimate: dict[str, int]) -> list[str]:
    """The recipe's estimate of the fullest rank and the difference from what was built."""
    if not estimate:
        return []
    fullest = max(reports, key=needed).sizes
    built = {
        "weights": fullest["weights"],
        "gradients": fullest["gradients"],
        "state": fullest["momentum"] + fullest["masters"],
    }
    parts = [
        f"{kind} {size(estimate[kind])} ({_percent(estimate[kind], built[kind])})" for kind in built if kind in estimate
    ]
    return [f"the recipe's estimate of the fullest rank: {', '.join(parts)}"]


def _percent(estimated: int, built: int) -> str:
    return f"{100 * (estimated - built) / built:+.2f} %" if built else "nothing built"


def _by_stage(reports: list[RankReport]) -> list[RankReport]:
    """The first report of each stage: shards of a stage have the same buffers."""
    return list({report.stage: report for report in reversed(reports)}.values())[::-1]


def _buckets(report: RankReport) -> str:
    count = len(report.buckets)
    elements, padding = (sum(bucket[what] for bucket in report.buckets) for what in ("elements", "padding"))
    share = 100 * padding / elements if elements else 0.0
    return (
        f"rank {report.rank:,}: {count} buckets of gradients, {elements:,} elements, {padding:,} of them padding "
        f"({share:.3f} %). It sends in a step:"
    )


def _lines(messages: list[dict[str, Any]]) -> list[str]:
    return [
        f"  {each['group']}, {each['ranks']:,} ranks: {each['messages']} x {each['collective']}, {size(each['bytes'])}"
        for each in messages
    ] or ["  nothing"]


def _checkpoint(reports: list[RankReport]) -> str | None:
    """Size and number of files of a whole checkpoint, from one rank of each stage."""
    first, stages = reports[0], [report for report in _by_stage(reports) if report.checkpoint]
    if not stages:
        return "checkpoint: not planned (no --save, --steps, or a format other than torch_dist)"
    whole: dict[str, int] = {}
    for report in stages:
        whole |= report.checkpoint["whole"]  # type: ignore[index]
    by_stage = {report.stage: report.checkpoint["state_of_stage"] for report in stages}  # type: ignore[index]
    nearest = (min(by_stage, key=lambda known: abs(known - stage)) for stage in range(first.layout["PP"]))
    total = sum(whole.values()) + sum(by_stage[stage] for stage in nearest)
    files = first.world_size * stages[0].checkpoint["files_of_rank"]  # type: ignore[index]
    return f"checkpoint: {size(total)}, up to {files:,} files of tensors"


def _loaded(report: RankReport) -> str | None:
    if report.loaded is None:
        return None
    if not report.loaded["tensors"] and not report.loaded["converted"]:
        folder = report.loaded["folder"]
        return f"--load {folder}: no checkpoint found here, so the run would start from random weights"
    converted = ", ".join(report.loaded["converted"]) or "nothing"
    return (
        f"--load {report.loaded['folder']}: iteration {report.loaded['iteration']}, {report.loaded['tensors']} tensors "
        f"of rank {report.rank} are in its metadata with this shape; to convert: {converted}"
    )


def _activations(report: RankReport) -> int:
    return report.steps["activations"] if report.steps else 0


def _memory(reports: list[RankReport], gpu_memory: float | None) -> str:
    fullest = max(reports, key=needed)
    activations = NO_ACTIVATIONS
    if fullest.steps:
        activations = (
            f"with the {size(_activations(fullest))} that autograd kept at most at a time, with local attention that "
            "stores its scores"
        )
    of = "" if gpu_memory is None else f" of {gpu_memory:g} GiB"
    ending = " TOO LARGE" if is_too_large(reports, gpu_memory) else ""
    return f"rank {fullest.rank:,} needs {size(needed(fullest))}{of}; {activations}.{ending}"


def size(count: int) -> str:
    """``count`` bytes in the largest unit in which it is at least 1."""
    power = min(3, int(math.log(count, 1024))) if count else 0
    return f"{count / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{count} B"
