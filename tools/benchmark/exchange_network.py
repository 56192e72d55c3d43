"""The gather after a step on slow links, in parameters and in signs: network namespaces joined by limited veth pairs.

    python -m tools.benchmark.exchange_network [--rates 50 100 1000] [--layouts 2x1 4x1 2x2] [--repeats 9] [--steps]

A layout is nodes x ranks. Every node is a network namespace with one link of RATE Mb/s in each direction (tc, token
bucket) to a bridge in a namespace of its own. Both gathers are timed in turn in the same processes: medians. With
``--steps`` whole training steps of a small GPT are timed instead: one run of Megatron for each gather, in which the
rates follow each other. Megabytes are what the first node's interface has sent.

Needs root, ip and tc. Gloo and one thread for each rank, so high rates are bound by the CPU.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "eth0"
PORT = 29511
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--micro-batch-size 1 --global-batch-size 4 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1 "
    "--lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --weight-decay 0.1 --bf16 --optimizer lion "
    "--use-distributed-optimizer"
)
# Training steps at each rate, and how many of the first ones are left out: as the first step of all, and the one in
# which the rate changes.
STEPS, LEFT_OUT = 8, 2
STEP = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def problem() -> str | None:
    """Why namespaces cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"needs {command}"
    probe = subprocess.run(["ip", "netns", "add", _name("probe")], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"ip netns add: {probe.stderr.strip()}"
    _run("ip", "netns", "del", _name("probe"))
    return None


@contextlib.contextmanager
def network(nodes: int, megabits: float | None) -> Iterator[list[str]]:
    """Namespaces of ``nodes`` nodes, each on a link of ``megabits`` per second; None for no limit. Yields their names.

    Node i has the address 10.213.88.(i + 1).
    """
    hub, names = _name("hub"), [_name(str(node)) for node in range(nodes)]
    try:
        for name in (hub, *names):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "br0", "up")
        for node, name in enumerate(names):
            port = f"p{node}"
            peer = ("peer", "name", INTERFACE, "netns", name)
            _run("ip", "-n", hub, "link", "add", port, "type", "veth", *peer)
            _run("ip", "-n", hub, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"10.213.88.{node + 1}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
        if megabits:
            limit(names, megabits)
        yield names
    finally:
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def limit(names: Sequence[str], megabits: float) -> None:
    """Limit each node's link to ``megabits`` per second in each direction, also while it is in use."""
    bucket = ("tbf", "rate", f"{megabits:g}mbit", "burst", "256kb", "latency", "50ms")
    for node, name in enumerate(names):
        for namespace, device in ((_name("hub"), f"p{node}"), (name, INTERFACE)):
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *bucket)


def sent_bytes(name: str) -> int:
    """What the interface of a node has sent."""
    line = ["ip", "-n", name, "-s", "-j", "link", "show", INTERFACE]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


def exchange(
    names: Sequence[str], ranks: int, *flags: str, module: str = "exchange_rank", timeout: float = 300.0
) -> list[dict]:
    """What ``module`` of tools.benchmark prints on rank 0, with ``ranks`` ranks in each of the namespaces."""
    world = len(names) * ranks
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(ranks)}
        line = [sys.executable, "-m", f"tools.benchmark.{module}", *flags]
        processes.append(_start(names[rank // ranks], line, place))
    return [json.loads(line) for line in _output(processes, timeout).splitlines() if line.startswith("{")]


def train(
    names: Sequence[str], ranks: int, text: Path, rates: Sequence[float], *flags: str, timeout: float = 900.0
) -> tuple[dict[float, float], int]:
    """Train a small GPT, at one rate after the other. Returns the median milliseconds of a step at each rate, and the
    bytes that the first node has sent from start to end."""
    from megatron_lion.integration.cpu import run_flags

    data = " ".join(f"--{split}-data-path {text}/{split}_text_document" for split in ("train", "valid", "test"))
    tokenizer = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {text}/tokenizer.model"
    steps = f"--train-iters {STEPS * len(rates)}"
    words = " ".join((MODEL, steps, run_flags.FLAGS, tokenizer, data, *flags)).split()
    before = sent_bytes(names[0])
    with tempfile.TemporaryDirectory() as folder:
        logs, processes = [Path(folder) / name for name in names], []
        for node, name in enumerate(names):
            rendezvous = f"--nnodes {len(names)} --node-rank {node} --nproc-per-node {ranks} --master-addr 10.213.88.1"
            torchrun = ["-m", "torch.distributed.run", *rendezvous.split(), "--master-port", str(PORT + 1)]
            line = [sys.executable, *torchrun, str(ROOT / "launch" / "pretrain_gpt.py"), *words]
            with logs[node].open("w") as log:
                processes.append(_start(name, line, run_flags.ENVIRONMENT, log))
        deadline = time.monotonic() + timeout
        for index, rate in enumerate(rates):
            limit(names, rate)
            while len(_step_times(logs)) < STEPS * (index + 1) and any(each.poll() is None for each in processes):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        _output(processes, max(deadline - time.monotonic(), 1.0), logs)
        times = _step_times(logs)
    medians = {rate: statistics.median(times[STEPS * i + LEFT_OUT : STEPS * (i + 1)]) for i, rate in enumerate(rates)}
    return medians, sent_bytes(names[0]) - before


def _step_times(logs: Sequence[Path]) -> list[float]:
    """Of the steps so far; one rank prints them."""
    return [float(found) for log in logs for found in STEP.findall(log.read_text(errors="replace"))]


def _start(name: str, line: list[str], place: dict[str, str], output: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    shared = {"MASTER_ADDR": "10.213.88.1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **shared, **place}
    command = ["ip", "netns", "exec", name, *line]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def _output(processes: list[subprocess.Popen[str]], timeout: float, logs: Sequence[Path] = ()) -> str:
    """All that the processes print, to ``logs`` if there are any. RuntimeError with it if one fails."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        outputs = [log.read_text(errors="replace") for log in logs] or outputs
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank failed:\n" + "\n".join(output[-3000:] for output in outputs))
    return "".join(outputs)


def _name(what: str) -> str:
    """Of a namespace: unique to this process."""
    return f"lion-exchange-{os.getpid()}-{what}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _exchange_rows(layout: str, rates: Sequence[float], repeats: int) -> Iterator[str]:
    nodes, ranks = map(int, layout.split("x"))
    for rate in rates:
        with network(nodes, rate) as names:
            for row in exchange(names, ranks, "--repeats", str(repeats)):
                (params, signs), (full, short) = row["ms"].values(), row["bytes"].values()
                yield (
                    f"{layout:7} {rate:6g} {row['kind']:5} {params:9.1f} {signs:9.1f} {params / signs:7.2f} "
                    f"{full / 1e6:8.2f} {short / 1e6:8.2f} {full / short:7.2f}"
                )


def _step_rows(layout: str, rates: Sequence[float], text: Path) -> Iterator[str]:
    nodes, ranks = map(int, layout.split("x"))
    with network(nodes, rates[0]) as names:
        (params, full), (signs, short) = (
            train(names, ranks, text, rates, f"--lion-gather {gather}") for gather in ("params", "signs")
        )
    for rate in rates:
        yield f"{layout:7} {rate:6g} {params[rate]:9.1f} {signs[rate]:9.1f} {params[rate] / signs[rate]:7.2f}"
    yield f"{layout:7} whole runs: {full / 1e6:.1f} and {short / 1e6:.1f} MB sent by the first node"


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a benchmark in namespaces. Exits if they cannot be made here."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[50, 100, 1000],
        help="Mb/s; 0 for no limit, but not with --steps (default: 50 100 1000)",
    )
    parser.add_argument("--repeats", type=int, default=9, help="exchanges of each kind (default: %(default)s)")
    parser.add_argument(
        "--layouts", nargs="+", default=["2x1", "4x1", "2x2"], help="nodes x ranks (default: 2x1 4x1 2x2)"
    )
    parser.add_argument("--steps", action="store_true", help="time training steps of Megatron instead")
    args = parser.parse_args(arguments)
    if args.steps and not all(args.rates):
        parser.error("--rates 0 is not supported with --steps")
    if (why := problem()) is not None:
        raise SystemExit(f"{parser.prog}: {why}")
    return args


@contextlib.contextmanager
def text_to_train_on() -> Iterator[Path]:
    """A folder with a small corpus."""
    from tools.corpus import small_corpus

    with tempfile.TemporaryDirectory() as folder:
        small_corpus.prepare(Path(folder), vocab_size=512, max_megabytes=0.3)
        yield Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(__doc__.splitlines()[0], arguments)
    if args.steps:
        print("layout    Mb/s params ms  signs ms  faster, of a training step", flush=True)
        with text_to_train_on() as text:
            for layout in args.layouts:
                for row in _step_rows(layout, args.rates, text):
                    print(row, flush=True)
        return
    print("layout    Mb/s kind  params ms  signs ms  faster  params MB signs MB  fewer", flush=True)
    for layout in args.layouts:
        for row in _exchange_rows(layout, args.rates, args.repeats):
            print(row, flush=True)


if __name__ == "__main__":
    main()
