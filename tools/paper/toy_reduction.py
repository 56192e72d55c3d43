"""The toy problem of appendix A.1.1 with packed gradients: Lion's left sides against the theorems' right sides.

    python -m tools.paper.toy_reduction --output docs/results/toy-reduction

The settings are those of tools/paper/toy_convergence.py: the paper's learning rate and betas, and the corollaries'.
Each of four ranks has the gradient with noise N(0, 4 I), so that the noise of their mean is the paper's N(0, I). It has
the same values for every scheme. The arms of tools/paper/studies/reduce_arms.py make the mean, with the code of
--lion-reduce. A block of 64 has the two elements of one run, or those of 32 runs.

Prints the tables and leaves the figure curves.svg in the folder.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_lion.config import LionError
from megatron_lion.exchange.blocks import BLOCK
from megatron_lion.run import readable_errors
from tools.paper import toy_convergence as toy
from tools.paper.studies.reduce_arms import ARMS

RANKS, STARTS, REPEATS, SEED = 4, 5, 5, 0
SCHEMES = ("fp32", "int8", "int4", "int4-none", "ternary", "ternary-none", "1bit")
SETTINGS = ("paper", "corollary")


class Mean:
    """The mean of four ranks' gradients of all runs, as the arm ``scheme`` makes it."""

    def __init__(self, scheme: str, *, runs: int, is_alone: bool) -> None:
        self._reduce, self._is_alone = ARMS[scheme](), is_alone
        blocks = runs if is_alone else -(-2 * runs // BLOCK)
        rows = -(-blocks // RANKS) * RANKS
        self.param = torch.nn.Parameter(torch.zeros(rows, BLOCK))
        self.grad_data = torch.zeros(rows * BLOCK)
        self.param_to_index = {self.param: (0, rows * BLOCK)}
        self._generator = torch.Generator().manual_seed(SEED)

    def __call__(self, mean: Tensor) -> Tensor:
        """``mean`` has the gradients, [runs, 2], that the ranks would agree on without compression."""
        own = torch.randn(RANKS, *mean.shape, generator=self._generator, dtype=torch.float64)
        of_ranks = (mean + math.sqrt(RANKS) * (own - own.mean(0))) / RANKS
        padded = functional.pad(of_ranks, (0, BLOCK - 2)) if self._is_alone else of_ranks
        flat = padded.flatten(1)
        flat = functional.pad(flat, (0, self.grad_data.numel() - flat.shape[1])).float()
        received = self._reduce(self, list(flat)).double()
        return received.view(-1, BLOCK)[: len(mean), :2] if self._is_alone else received[: 2 * len(mean)].view(-1, 2)


@dataclass(frozen=True)
class Curves:
    """Of one scheme, by setting and whether it is constrained: both sides after each step, means over the starts."""

    left: dict[tuple[str, bool], Tensor]
    right: dict[tuple[str, bool], Tensor]


def simulate(scheme: str, *, is_alone: bool, steps: int = toy.PAPER_STEPS) -> Curves:
    """Run all settings with one scheme."""
    cases: dict[tuple[str, bool], Sequence[toy.Case]] = {}
    for constrained in (True, False):
        decay = toy.BOX_DECAY if constrained else toy.FREE_DECAY
        paper = toy.paper_cases(STARTS, SEED, constrained=constrained, weight_decay=decay)
        cases["paper", constrained] = paper
        cases["corollary", constrained] = toy.corollary_cases(paper, toy.PAPER_STEPS)
    together = [case for group in cases.values() for case in group]
    receive = Mean(scheme, runs=len(together) * REPEATS, is_alone=is_alone)
    left = toy.simulate(together, repeats=REPEATS, steps=steps, seed=SEED, receive=receive).left
    parts = dict(zip(cases, left.split(STARTS), strict=True))
    return Curves(
        {key: part.mean(0) for key, part in parts.items()},
        {key: toy.right_sides(group, steps).mean(0) for key, group in cases.items()},
    )


def table(curves: dict[tuple[str, bool], Curves], setting: str) -> Iterator[str]:
    """Markdown: left / right at the end, and at most, for each scheme."""
    sides = ("(9), own block", "(9), shared block", "(13), own block", "(13), shared block")
    yield f"| scheme | {' | '.join(sides)} |"
    yield "|---" * (len(sides) + 1) + "|"
    for scheme in SCHEMES:
        cells = []
        for constrained in (True, False):
            for is_alone in (True, False):
                found = curves[scheme, is_alone]
                share = found.left[setting, constrained] / found.right[setting, constrained]
                cells.append(f"{float(share[-1]):.4f} ({float(share.max()):.3f})")
        yield f"| {scheme} | {' | '.join(cells)} |"


def draw(curves: dict[tuple[str, bool], Curves], path: Path) -> None:
    """Left sides of every scheme in shared blocks with the paper's settings, and the right side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "toy", "figure.constrained_layout.use": True, "font.size": 10})
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.0))
    for axes, constrained in zip(panels, (True, False), strict=True):
        for scheme in SCHEMES:
            left = curves[scheme, False].left["paper", constrained]
            axes.loglog(range(1, len(left) + 1), left, label=scheme, linewidth=1.2)
        right: Any = curves["fp32", False].right["paper", constrained]
        axes.loglog(range(1, len(right) + 1), right, "k--", label="right side")
        name, equation = ("constrained", "(9)") if constrained else ("unconstrained", "(13)")
        axes.set(xlabel="k", ylabel="mean over the steps up to k", title=f"{name}, both sides of {equation}")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[1].legend(loc="lower left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Run every scheme, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the figure")
    options = parser.parse_args()
    curves = {(s, is_alone): simulate(s, is_alone=is_alone) for s in SCHEMES for is_alone in (True, False)}
    if any(bool(value.isnan().any()) for found in curves.values() for value in found.left.values()):
        raise LionError("a run is not finite")
    options.output.mkdir(parents=True, exist_ok=True)
    draw(curves, options.output / "curves.svg")
    for setting in SETTINGS:
        print(f"{setting}:\n", *table(curves, setting), "", sep="\n")


if __name__ == "__main__":
    with readable_errors():
        main()
