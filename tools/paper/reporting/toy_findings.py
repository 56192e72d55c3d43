"""What tools/paper/toy_convergence.py left: the rate of table 1, the figures A1 and A2, and other eta and lambda."""

from pathlib import Path
from typing import Any

from tools.paper.reporting.findings import Finding, Judgement, how_much, read_json, read_svg, sentence
from tools.paper.reporting.paper import Table
from tools.paper.reporting.study_runs import span

CLOSE = 0.02  # of an exponent to the rate's
PAPER_LR = 0.01
SMALL_IN_LARGE = r"small $\eta$ in a large box"
Settings = list[dict[str, Any]]


def rates(folder: Path, hardware: str) -> Finding:
    """Table 1: the slope with the corollaries' own hyperparameters."""
    result = read_json(folder / "result.json")
    fits = {name: result[name]["corollary"] for name in ("constrained", "unconstrained")}
    held = all(abs(fit["slope"] + 0.25) <= CLOSE for fit in fits.values())
    said = f"{'holds in part' if held else 'does not hold'} on the toy problem: the exponents of $K$ are "
    said += f"{'' if held else 'not both '}within {CLOSE} of $-1/4$"
    return Finding(
        verdict=rf"{sentence(said)}, with the corollaries' own $\beta_1$, $\beta_2$ and $\eta$. The points of a fit "
        f"share their starts, so its interval is too narrow: the verdict is the agreement within {CLOSE} only. A rate "
        "is a theorem, so a run can only agree with it. Two dimensions say nothing about $d$.",
        made=f"the toy problem of appendix A.1.1, its own Gaussian noise; {hardware}",
        tables=[_slopes_table(fits)],
        pictures={"The corollaries' runs": read_svg(folder / "corollary.svg")},
        judgements=[
            Judgement(
                claim=r"LION's $\ell_1$ norm falls as $\sqrt{d} K^{-1/4}$",
                verdict=f"{said}. Nothing is shown about $d$",
                basis="toy problem, d = 2, the corollaries' hyperparameters",
                numbers="exponents of $K$: " + ", ".join(f"{name} {fit['slope']:.4f}" for name, fit in fits.items()),
            )
        ],
    )


def _slopes_table(fits: dict[str, dict[str, Any]]) -> Table:
    table = [["problem", "$K$", "exponent of $K$ [95 %, too narrow]", "the rate's"]]
    for name, fit in fits.items():
        steps = [row["steps"] for row in fit["rows"]]
        interval = f"{fit['slope']:.4f} [{fit['slope_low']:.4f}, {fit['slope_high']:.4f}]"
        table.append([name, f"{min(steps):,} to {max(steps):,}", interval, "-0.25"])
    return table


def pictures(folder: Path, hardware: str) -> Finding:
    """Figure A1."""
    minimum, lowest = read_json(folder / "result.json")["minimum"]
    word = "holds" if round(minimum, 3) == 2.125 and round(lowest, 3) == 1.884 else "does not hold"
    numbers = rf"minima at $\pm {minimum:.6f}$, $f^* = {lowest:.6f}$"
    return Finding(
        verdict=f"{sentence(word)} to the digits given: {numbers}.",
        made=f"computed, float64; {hardware}",
        pictures={
            "(a) surface": read_svg(folder / "A1a_surface.svg"),
            "(b) contours": read_svg(folder / "A1b_contours.svg"),
        },
        judgements=[
            Judgement(
                claim=r"minima at $(0, \pm 2.125)$ and $(\pm 2.125, 0)$ with $f^* = 1.884$",
                verdict=f"{word} to the digits given",
                basis="toy problem, float64",
                numbers=numbers,
            )
        ],
    )


def bound(folder: Path, hardware: str) -> Finding:
    """Figure A2: its own setting, and the other eta and lambda of the record's grid."""
    result = read_json(folder / "result.json")
    shares = {name: result[name]["paper"]["averaged"] for name in ("constrained", "unconstrained")}
    grids = {name: grid for name in shares if (grid := result[name].get("grid"))}
    own, others = _judged_own(shares), _others(result, grids)
    judged = [_judged_others(others)] if others else []
    return Finding(
        verdict=rf"{sentence(own.verdict)}. $\eta = {PAPER_LR}$ and the default $\beta_1$, $\beta_2$ are not the "
        "corollaries', which do not promise the bound for them." + "".join(map(_about_others, judged)),
        made=f"5 starts x 5 repeats, 2,000 steps, the package's own update rule in float64; {hardware}",
        pictures={
            "(a) in the box": read_svg(folder / "A2a_constrained.svg"),
            "(b) without it": read_svg(folder / "A2b_unconstrained.svg"),
        },
        tables=[_own_table(shares), *(_grid_table(name, grid) for name, grid in grids.items())],
        missing=[] if judged else [f"{folder / 'result.json'} has no other eta and lambda"],
        judgements=[own, *judged],
    )


def _own_table(shares: dict[str, dict[str, Any]]) -> Table:
    table = [["problem", "largest left / right", "at $k$", "above the bound for $k$", "at the end"]]
    for name, share in shares.items():
        above = "never" if share["over_from"] is None else f"{share['over_from']} to {share['over_to']}"
        table.append([name, f"{share['largest']:.3f}", str(share["at"]), above, f"{share['at_the_end']:.3f}"])
    return table


def _judged_own(shares: dict[str, dict[str, Any]]) -> Judgement:
    over = [name for name, share in shares.items() if share["over_from"] is not None]
    if any(share["at_the_end"] > 1.0 for share in shares.values()):
        verdict = "does not hold: the left side is above the bound at the end"
    else:
        verdict = f"holds in part: at the end, not for every $k$ ({', '.join(over)})" if over else "holds for every $k$"
    return Judgement(
        claim="the left sides of (9) and (13) agree with the theory's rate",
        verdict=verdict,
        basis=rf"toy problem, d = 2, $\eta = {PAPER_LR}$, 2,000 steps, 5 starts x 5 repeats",
        numbers="left / right, largest and at the end: "
        + ", ".join(f"{name} {share['largest']:.3f} and {share['at_the_end']:.3f}" for name, share in shares.items()),
    )


def _grid_table(name: str, grid: Settings) -> Table:
    """Left / right at the end and at its largest, by eta (rows) and lambda (columns)."""
    decays = sorted({row["weight_decay"] for row in grid})
    cells = {
        (row["lr"], row["weight_decay"]): f"{row['at_the_end']:.3f} (largest {row['largest']:.3f})" for row in grid
    }
    head = [f"{name}: left / right at the end", *(rf"$\lambda = {decay:g}$" for decay in decays)]
    lrs = sorted({row["lr"] for row in grid})
    return [head, *([rf"$\eta = {lr:g}$", *(cells.get((lr, decay), "-") for decay in decays)] for lr in lrs)]


def _others(result: dict[str, Any], grids: dict[str, Settings]) -> dict[str, Settings]:
    """The settings of the grids that are not the figure's own; problems without any are left out."""
    found = {}
    for name, grid in grids.items():
        own = (PAPER_LR, result[name]["paper"]["weight_decay"])
        found[name] = [row for row in grid if (row["lr"], row["weight_decay"]) != own]
    return {name: rows for name, rows in found.items() if rows}


def _judged_others(others: dict[str, Settings]) -> Judgement:
    """Whether left / right is at most 1 at the end for every other eta and lambda."""
    rows = [row for of_one in others.values() for row in of_one]
    held = [row for row in rows if row["at_the_end"] <= 1.0]
    verdict = f"{how_much(len(held), len(rows))}: at the end for {len(held)} of {len(rows)} settings"
    verdict += f"; does not hold for {_where(others)}" if 0 < len(held) < len(rows) else ""
    basis = "; ".join(f"{name} {_spans(of_one)}" for name, of_one in others.items())
    return Judgement(
        claim=r"the left sides agree with the theory's rate for other $\eta$ and $\lambda$ too",
        verdict=verdict,
        basis=f"toy problem, d = 2, {basis}; 2,000 steps, 5 starts x 5 repeats",
        numbers=_numbers(others, [row["at_the_end"] for row in held]),
    )


def _spans(settings: Settings) -> str:
    lrs, decays = (span((row[key] for row in settings), "g") for key in ("lr", "weight_decay"))
    return rf"$\eta$ {lrs}, $\lambda$ {decays}"


def _above(settings: Settings) -> Settings:
    return [row for row in settings if row["at_the_end"] > 1.0]


def _where(others: dict[str, Settings]) -> str:
    """Which settings are above the bound at the end.

    They are ``SMALL_IN_LARGE`` where all are in the box, and every setting with a smaller eta and lambda is one too.
    """
    box = others.get("constrained", [])
    above = _above(box)
    corner = [
        row
        for row in box
        if any(row["lr"] <= one["lr"] and row["weight_decay"] <= one["weight_decay"] for one in above)
    ]
    is_corner = above == corner and not _above(others.get("unconstrained", []))
    return SMALL_IN_LARGE if is_corner else r"some $\eta$ and $\lambda$"


def _numbers(others: dict[str, Settings], held: list[float]) -> str:
    """Left / right at the end: each that is above 1, and the largest of the others."""
    parts = []
    for name, rows in others.items():
        for lr in dict.fromkeys(row["lr"] for row in _above(rows)):
            of_lr = [row for row in _above(rows) if row["lr"] == lr]
            values = ", ".join(f"{row['at_the_end']:.3f}" for row in of_lr)
            decays = ", ".join(f"{row['weight_decay']:g}" for row in of_lr)
            parts.append(rf"{name}, $\eta = {lr:g}$: {values} for $\lambda$ = {decays}")
    parts += [f"{'the others' if parts else 'all'} at most {max(held):.3f}"] if held else []
    return f"left / right at the end: {'; '.join(parts)}"


def _about_others(judged: Judgement) -> str:
    text = rf" For other $\eta$ and $\lambda$ the claim {judged.verdict}. The ratios in the tables have no intervals."
    if SMALL_IN_LARGE in judged.verdict:
        text += r" A step moves a parameter by at most $2 \eta$, and the runs start $1 / \lambda$ from 0."
        text += r" With a small $\eta$ they arrive late."
    return text
