"""megatron-lion doctor --cluster: real ranks over gloo, one of which is made odd; and who is named by what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.cli import main
from megatron_lion.cli.cluster import network, rank_facts
from tests.harness import Run, run_ranks, torchrun

SCRIPT = Path(__file__).with_name("odd_rank.py")
FACTS = {
    "machine": "a", "node": 0, "local": 0, "python": "3.12.1", "torch": "2.13.0", "cuda": "13.0", "nccl": "2.29",
    "megatron-core": "0.19.2", "transformer-engine": None, "megatron-lion": "0.1.0", "device": "H100, 79 GiB",
    "gpus": 2, "gpu": "0",
}  # fmt: skip


def examine(odd: int, what: str, *flags: str, ranks: int = 3) -> Run:
    return run_ranks(f"{odd} {what} --megabytes 1", *flags, ranks=ranks, script=SCRIPT)


def verdicts(run: Run) -> list[str]:
    return [line for line in run.output.splitlines() if "READY" in line]


def test_ranks_that_agree_are_ready_and_measured() -> None:
    run = examine(9, "nothing", ranks=2)
    assert run.returncode == 0, run.output
    assert verdicts(run) == ["READY: the ranks agree"]
    rows = [line.split() for line in run.output.splitlines() if re.match(r"\d ", line)]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all("CPU" in row for row in rows)
    assert re.search(r"^all-reduce of 1 MiB: \S+ s, \S+ GB/s$", run.output, re.MULTILINE)
    assert re.search(r"^links within a node: .* the slowest \S+ GB/s between ranks 0 and 1$", run.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("odd", "what", "sentence"),
    [
        (1, "python", r"rank 1 \(node 0, \S+\): python is 3\.11\.9, \S+ on 2 of 3 ranks"),
        (2, "clock", r"rank 2 \(node 0, \S+\): its clock is 7\.5 s behind rank 0's: let the nodes keep time \(NTP\)"),
        pytest.param(0, "clock", r"rank 1 .*: its clock is 7\.5 s ahead of rank 0's", marks=pytest.mark.slow),
        pytest.param(
            1, "wrong-sum", r"connect failed on rank 1 .node 0.: LionError: the sum of 1 el", marks=pytest.mark.slow
        ),
        pytest.param(0, "slow", r"ranks 0, 1 .*: the link between them takes \d+ times", marks=pytest.mark.slow),
    ],
)
def test_the_odd_rank_is_named(odd: int, what: str, sentence: str) -> None:
    run = examine(odd, what)
    assert run.returncode == 1, run.output
    assert any(re.match(f"NOT READY: {sentence}", line) for line in verdicts(run)), run.output


@pytest.mark.parametrize(
    ("odd", "what", "sentence"),
    [
        (2, "silent", r"rank 2 \(node 0\) did not answer within 4 s \(who is there\)"),
        pytest.param(0, "silent", r"rank [12] cannot reach 127\.0\.0\.1:\d+ \(MASTER", marks=pytest.mark.slow),
        pytest.param(
            1,
            "stuck",
            r"links failed on rank 0 \(node 0\): LionError: no answer from rank 1: .*rank 1 \(node 0\): no end ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_does_not_answer_ends_it_in_time(odd: int, what: str, sentence: str) -> None:
    """No hang: the odd one sleeps for two minutes, and then nothing would be wrong."""
    run = examine(odd, what, "--timeout 4")
    assert run.returncode != 0, run.output
    assert any(re.match(f"NOT READY: {sentence}", line) for line in verdicts(run)), run.output


@pytest.mark.slow
def test_it_runs_under_torchrun() -> None:
    run = torchrun("doctor --cluster --megabytes 1", ranks=2, script="-m megatron_lion.cli")
    assert run.returncode == 0, run.output
    assert verdicts(run) == ["READY: the ranks agree"]


def ranks(count: int, **odd: dict[int, Any]) -> list[dict[str, Any]]:
    """Facts of ``count`` ranks, two on each node, with a GPU each; ``odd`` changes keys by rank."""
    found = [
        FACTS | {"machine": f"node{rank // 2}", "node": rank // 2, "local": rank % 2, "gpu": str(rank)}
        for rank in range(count)
    ]
    for key, values in odd.items():
        for rank, value in values.items():
            found[rank][key.replace("_", "-")] = value
    return found


def test_few_are_odd_and_rank_0_is_right_in_a_tie() -> None:
    assert rank_facts.mismatches(ranks(4)) == []
    assert rank_facts.mismatches(ranks(6, megatron_core={4: "0.19.1", 5: "0.19.1"})) == [
        "ranks 4, 5 (node 2, node2): megatron-core is 0.19.1, 0.19.2 on 4 of 6 ranks"
    ]
    assert rank_facts.mismatches(ranks(2, torch={0: "2.12.0"})) == [
        "rank 1 (node 0, node0): torch is 2.13.0, 2.12.0 on 1 of 2 ranks"
    ]
    assert rank_facts.mismatches(ranks(4, transformer_engine={0: "2.0"})) == [
        "rank 0 (node 0, node0): transformer-engine is 2.0, None on 3 of 4 ranks"
    ]


def test_ranks_without_a_gpu_of_their_own_are_named() -> None:
    assert rank_facts.gpu_problems(ranks(4)) == []
    one_less = ranks(4, device={3: "no GPU"}, gpus={2: 1, 3: 1}, gpu={3: None})
    assert rank_facts.gpu_problems(one_less) == [
        "rank 3 (node 1, node1): local rank 1 has no GPU, 1 are visible there: lower --nproc-per-node, or correct "
        "CUDA_VISIBLE_DEVICES"
    ]
    assert rank_facts.gpu_problems(ranks(4, gpu={3: "2"})) == [
        "ranks 2, 3 (node 1, node1): all on one GPU (2): correct CUDA_VISIBLE_DEVICES"
    ]


def test_a_clock_within_a_second_or_its_uncertainty_is_right() -> None:
    offsets = [(0.0, 0.0), (0.9, 0.0), (-3.0, 2.5), (-1.5, 0.1)]
    assert rank_facts.clock_problems(offsets, ranks(4)) == [
        "rank 3 (node 1, node1): its clock is 1.5 s behind rank 0's: let the nodes keep time (NTP)"
    ]


def test_a_slow_rank_is_told_from_a_slow_link() -> None:
    assert network.ring(1) == [] and network.ring(2) == [(0, 1)] and network.ring(3) == [(0, 1), (1, 2), (2, 0)]
    facts = [fact | {"node": rank} for rank, fact in enumerate(ranks(8))]
    links = dict.fromkeys(network.ring(8), 0.1)
    assert network.link_problems(links, facts) == []
    link = links | {(3, 4): 1.5}
    assert network.link_problems(link, facts) == [
        "ranks 3, 4 (node 3, node1, node 4, node2): the link between them takes 15 times the median between nodes"
    ]
    rank = links | {(3, 4): 1.5, (4, 5): 2.0}
    assert network.link_problems(rank, facts) == [
        "rank 4 (node 4, node2): each of its links between nodes takes over 10 times the median"
    ]
    kinds = {(0, 1): 0.1, (1, 2): 5.0, (2, 3): 0.1, (3, 0): 5.0}  # between nodes all are slower
    assert network.link_problems(kinds, ranks(4)) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["enable", "--cluster"], "enable takes no arguments, got --cluster"),
        (["doctor", "--cluster", "--timeout", "0"], "--timeout 0 and --megabytes 64 must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_launcher_it_says_how_to_start_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lion.cli", "doctor", "--cluster"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 1
    assert "NOT READY: --cluster runs on every rank of a launcher, and RANK is not set: torchrun" in done.stdout
