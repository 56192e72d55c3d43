"""The toy problem of appendix A.1.1 of Dong, Li, Lin (2025): Lion's left sides against the theorems' right sides.

python -m tools.paper.toy_convergence --output runs/toy

f(theta) = theta_1^2 + theta_2^2 + 5 cos(theta_1) cos(theta_2), gradient noise N(0, I_2), several starts, each several
times, constrained to a box and not. Leaves the figures A1 and A2 of the paper, result.json and result.md in the folder.
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import CHEN_BETAS, MOMENTUM_INITS, LionError
from megatron_lion.run import readable_errors
from megatron_lion.update import lion_step
from tools.paper import theory, toy_figures

SMOOTHNESS = 7.0  # the Hessian's eigenvalues are 2 - 5 cos(theta_1 +- theta_2)
SIGMA = math.sqrt(2.0)
PAPER_LR, PAPER_STEPS = 0.01, 2000
BOX_DECAY = 0.1  # the box |theta_i| <= 10
FREE_DECAY = 0.05  # at most 1/(2C) for starts up to C = 10; the paper gives no value
GRID_LR = (0.001, 0.003, 0.01, 0.03, 0.1)
GRID_BOX_DECAY = (0.05, 0.1, 0.2, 0.5, 1.0)
GRID_FREE_DECAY = (0.0, 0.01, 0.025, 0.05)
COROLLARY_STEPS = (1000, 2000, 4000, 8000, 16_000, 32_000)
SHOWN_STEPS = (1, 10, 30, 50, 100, 200, 300, 400, 500, 700, 1000, 1500, 2000)
ROUNDING = 1e-12  # relative; what the checks on iterates allow float64


def value(theta: Tensor) -> Tensor:
    """f at each point, [..., 2] -> [...]."""
    return theta.square().sum(-1) + 5 * theta.cos().prod(-1)


def gradient(theta: Tensor) -> Tensor:
    """grad f at each point, [..., 2] -> [..., 2]."""
    return 2 * theta - 5 * theta.sin() * theta.cos().flip(-1)


def minimum() -> tuple[float, float]:
    """t and f*: the minima are (0, +-t) and (+-t, 0), where 2 t = 5 sin t, here to the last bits by Newton's method."""
    t = 2.125
    for _ in range(10):
        t -= (2 * t - 5 * math.sin(t)) / (2 - 5 * math.cos(t))
    return t, t * t + 5 * math.cos(t)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A start and the hyperparameters that Lion is run with from it."""

    start: tuple[float, float]
    constrained: bool
    """whether the left side is that of (9), the KKT residual, or that of (13), half the gradient's l1 norm"""
    weight_decay: float
    lr: float = PAPER_LR
    beta1: float = CHEN_BETAS[0]
    beta2: float = CHEN_BETAS[1]

    @property
    def problem(self) -> theory.Problem:
        """L, sigma, D and d."""
        return _problem(self.start)


def right_sides(cases: Sequence[Case], steps: int) -> Tensor:
    """The right side of (9) and (13) of each case at K = 1 ... ``steps``, [cases, steps].

    Whether or not the corollary's condition on K is met, as the dashed lines of figure A2 begin at 1.
    """
    at_1 = torch.tensor([theory.COROLLARY_FACTOR * theory.rate(case.problem, 1) for case in cases], dtype=torch.float64)
    return torch.outer(at_1, torch.arange(1, steps + 1, dtype=torch.float64) ** -0.25)


def _problem(start: tuple[float, float]) -> theory.Problem:
    gap = float(value(torch.tensor(start, dtype=torch.float64))) - minimum()[1]
    return theory.Problem(smoothness=SMOOTHNESS, sigma=SIGMA, gap=gap, dimension=2)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of each case; every number is a mean over the repeats unless it is said to be an extreme."""

    left: Tensor
    """[cases, steps]: the left side of (9) or (13) after each number of steps"""
    linf: Tensor
    """[cases]: the largest ||theta_k||_inf over iterates and repeats"""


def simulate(
    cases: Sequence[Case],
    *,
    repeats: int,
    steps: int,
    seed: int,
    momentum_init: str = "gradient",
    receive: Callable[[Tensor], Tensor] = lambda noisy: noisy,
) -> Outcome:
    """Run Lion from every case at once, ``repeats`` times each, in float64, by the package's own update rule.

    ``receive`` replaces the stochastic gradients of a step, [cases x repeats, 2], by those that the optimizer gets.

    Every iterate of a constrained case is checked to lie in its box with a KKT residual >= 0 (Theorem 2, i); in an
    unconstrained case the weight decay is checked against the largest iterate, lambda <= 1/(2C) (Theorem 4). Raises
    LionError naming the case where a check fails.
    """
    theta = _columns([case.start for case in cases], repeats)
    lr, beta1, beta2, weight_decay = (
        _columns([[getattr(case, name)] for case in cases], repeats)
        for name in ("lr", "beta1", "beta2", "weight_decay")
    )
    constrained = _columns([[float(case.constrained)] for case in cases], repeats).squeeze(1).bool()
    noise = torch.randn(steps, *theta.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left = torch.empty(steps, len(theta), dtype=torch.float64)
    linf, lowest = torch.zeros(len(theta), dtype=torch.float64), torch.full((len(theta),), torch.inf).double()
    exp_avg = torch.zeros_like(theta)
    for k in range(steps):
        grad = gradient(theta)
        l1 = grad.abs().sum(1)
        residual = theory.kkt_residual(grad, theta, weight_decay, dim=1)
        left[k] = torch.where(constrained, residual, l1 / 2)
        lowest = torch.minimum(lowest, residual + ROUNDING * l1)
        linf = torch.maximum(linf, theta.abs().amax(1))
        noisy = receive(grad + noise[k])
        if k == 0 and momentum_init == "gradient":
            exp_avg = noisy
        # Its hyperparameters may be tensors that broadcast: one row each, so that every run has its own.
        theta, exp_avg = lion_step(theta, noisy, exp_avg, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
    by_case = linf.view(len(cases), repeats).amax(1)
    _check_iterates(cases, by_case, lowest.view(len(cases), repeats).amin(1))
    return Outcome(left=theory.running_mean(left.T.reshape(len(cases), repeats, steps).mean(1)), linf=by_case)


def _columns(rows: Sequence[Sequence[float]], repeats: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).repeat_interleave(repeats, dim=0)


@contextlib.contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Turn a condition of the theory that is not met into one line that says in which case."""
    try:
        yield
    except ValueError as error:
        raise LionError(f"{case}: {error}") from error


def _check_iterates(cases: Sequence[Case], linf: Tensor, lowest: Tensor) -> None:
    for case, largest, residual in zip(cases, linf.tolist(), lowest.tolist(), strict=True):
        with _naming(case):
            if not case.constrained:
                theory.check_interior(largest, case.weight_decay)
                continue
            theory.check_in_box(largest / (1 + ROUNDING), case.weight_decay)
            if not residual >= 0.0:
                raise ValueError(f"an iterate in the box has the KKT residual {residual:g}, below 0")


def starts(count: int, seed: int, constrained: bool) -> list[tuple[float, float]]:
    """``count`` starts in [-1, 1]^2, with the first component 1 in the constrained case, to be scaled to the box."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.rand(2, count, 2, generator=generator, dtype=torch.float64) - 1
    points = drawn[0 if constrained else 1].tolist()
    return [(1.0, y) if constrained else (x, y) for x, y in points]


def paper_cases(count: int, seed: int, *, constrained: bool, weight_decay: float, lr: float = PAPER_LR) -> list[Case]:
    """The paper's starts: (1/lambda, U[-1/lambda, 1/lambda]) in the box, both components U[-10, 10] without one."""
    size = 1 / weight_decay if constrained else 10.0
    return [
        Case(start=(size * x, size * y), constrained=constrained, weight_decay=weight_decay, lr=lr)
        for x, y in starts(count, seed, constrained)
    ]


def _default_cases(options: argparse.Namespace, constrained: bool) -> list[Case]:
    weight_decay = BOX_DECAY if constrained else FREE_DECAY
    return paper_cases(options.starts, options.seed, constrained=constrained, weight_decay=weight_decay)


def corollary_cases(cases: Sequence[Case], steps: int) -> list[Case]:
    """The same starts with the corollary's own betas and learning rate for K = ``steps``, its conditions checked."""
    found = []
    for case in cases:
        problem, linf = case.problem, max(map(abs, case.start))
        with _naming(case):
            if case.constrained:
                theory.corollary_3(problem, steps, weight_decay=case.weight_decay, linf_start=linf)
            else:
                theory.corollary_5(problem, steps, weight_decay=case.weight_decay, linf_bound=linf)
            hyper = theory.corollary_constants(problem).hyperparameters(steps, problem.dimension)
        found.append(replace(case, lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2))
    return found


def paper_run(options: argparse.Namespace, constrained: bool) -> dict[str, Any]:
    """Figure A2: eta = 0.01, default betas, K = 2000; both sides at every k, averaged over starts and repeats.

    The interval is over starts: repeats from one start are not independent of each other.
    """
    cases = _default_cases(options, constrained)
    corner = replace(cases[0], start=(10.0, 10.0))
    outcome = simulate([*cases, corner], steps=PAPER_STEPS, **_shared(options))
    right = right_sides([*cases, corner], PAPER_STEPS)
    share = outcome.left / right
    left_mean, right_mean = outcome.left[:-1].mean(0), right[:-1].mean(0)
    return {
        "weight_decay": corner.weight_decay,
        "largest_iterate": float(outcome.linf[:-1].max()),
        "gaps": [case.problem.gap for case in cases],
        "left": left_mean.tolist(),
        "left_half_width": _half_width(outcome.left[:-1]),
        "right": right_mean.tolist(),
        "averaged": _excess(left_mean / right_mean),
        "by_start": [_excess(row) for row in share[:-1]],
        "corner": _excess(share[-1]),
    }


def _half_width(left: Tensor) -> Any:
    """Half the width of the 95 % interval of the mean over starts (the first dimension): a number, or a list of them.

    The repeats of a start are averaged before. None for one start.
    """
    return theory.half_width(left).tolist() if len(left) > 1 else None


def _excess(share: Tensor) -> dict[str, Any]:
    """Where left / right is largest, where it exceeds 1, and what it ends at."""
    over = (share > 1).nonzero().flatten() + 1
    return {
        "largest": float(share.max()),
        "at": int(share.argmax()) + 1,
        "over_from": int(over[0]) if len(over) else None,
        "over_to": int(over[-1]) if len(over) else None,
        "at_the_end": float(share[-1]),
    }


def corollary_runs(options: argparse.Namespace) -> dict[bool, dict[str, Any]]:
    """Both sides at the end of runs of each K with the corollary's own hyperparameters, and the left side's slope.

    All runs are one simulation, which goes on to the largest K; the shorter ones are read off at their own.
    """
    runs = [
        (constrained, steps, corollary_cases(_default_cases(options, constrained), steps))
        for constrained in (True, False)
        for steps in COROLLARY_STEPS
    ]
    shared = _shared(options) | {"momentum_init": "gradient"}
    together = [case for _, _, cases in runs for case in cases]
    left = simulate(together, steps=max(COROLLARY_STEPS), **shared).left.split(options.starts)
    found: dict[bool, dict[str, Any]] = {True: {"rows": []}, False: {"rows": []}}
    for (constrained, steps, cases), curves in zip(runs, left, strict=True):
        ends = curves[:, steps - 1]
        right = right_sides(cases, steps)[:, -1]
        row = {"steps": steps, "left": float(ends.mean()), "right": float(right.mean())}
        row["left_half_width"] = _half_width(ends)
        found[constrained]["rows"].append(row | {"largest_share": float((ends / right).max())})
    for entry in found.values():
        fit = theory.fit_power_law([row["steps"] for row in entry["rows"]], [row["left"] for row in entry["rows"]])
        entry.update(slope=fit.exponent, slope_low=fit.low, slope_high=fit.high)
    return found


def grid_run(options: argparse.Namespace, constrained: bool) -> list[dict[str, Any]]:
    """Other learning rates and weight decays, default betas, K = 2000: all of the grid in one simulation."""
    cells = [
        paper_cases(options.starts, options.seed, constrained=constrained, weight_decay=weight_decay, lr=lr)
        for lr in GRID_LR
        for weight_decay in (GRID_BOX_DECAY if constrained else GRID_FREE_DECAY)
    ]
    left = simulate([case for cell in cells for case in cell], steps=PAPER_STEPS, **_shared(options)).left
    rows = []
    for cell, part in zip(cells, left.split(options.starts), strict=True):
        share = part.mean(0) / right_sides(cell, PAPER_STEPS).mean(0)
        rows.append({"lr": cell[0].lr, "weight_decay": cell[0].weight_decay, **_excess(share)})
    return rows


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    return {"repeats": options.repeats, "seed": options.seed, "momentum_init": options.momentum_init}


def main() -> None:
    """Run everything, draw it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for figures and results")
    parser.add_argument("--starts", type=_count, default=5, metavar="N", help="starting points (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=_count, default=5, metavar="N", help="runs from each of them (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the starts and the noise (default: %(default)s)"
    )
    parser.add_argument(
        "--momentum-init",
        choices=MOMENTUM_INITS,
        default="gradient",
        help="m_0 for the paper's settings: gradient as in its proof, zero as in practice (default: %(default)s)",
    )
    parser.add_argument("--format", choices=("svg", "pdf"), default="svg", help="of the figures (default: %(default)s)")
    options = parser.parse_args()
    began = time.perf_counter()
    command = shlex.join(["python", "-m", "tools.paper.toy_convergence", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "minimum": minimum()}
    corollary = corollary_runs(options)
    for constrained in (True, False):
        result["constrained" if constrained else "unconstrained"] = {
            "paper": paper_run(options, constrained),
            "corollary": corollary[constrained],
            "grid": grid_run(options, constrained),
        }
    result["seconds"] = round(time.perf_counter() - began, 1)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = toy_figures.markdown(result, SHOWN_STEPS)
    (options.output / "result.md").write_text(text, encoding="utf-8")
    print(text)
    for path in toy_figures.draw(result, value, options.output, options.format):
        print(f"figure: {path}")


def _count(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


if __name__ == "__main__":
    with readable_errors():
        main()
