"""What runs left behind, as findings: pictures, tables, on what they were made, and whether the claim held."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.stats.writer import read_records
from megatron_lion.training_log import TrainingLog, read_training_log
from tools.paper.reporting import drawings
from tools.paper.reporting.paper import Table

WIDEST = 0.15  # of an interval that says something about an exponent


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A claim of the paper and what our runs say of it: a line of the report's first page."""

    claim: str
    verdict: str
    """in a few words, such as ``holds at the paper's rates, not at tuned ones``"""
    basis: str
    """model, d, rates, steps and seeds"""
    numbers: str
    """what was measured, with intervals"""


@dataclass
class Finding:
    """Ours beside one exhibit of the paper."""

    verdict: str
    """whether the claim held, in a sentence"""
    made: str
    """model, data, steps, hardware"""
    pictures: dict[str, str] = field(default_factory=dict)
    """SVG text by caption"""
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """what was wrong with the records, in words"""
    judgements: list[Judgement] = field(default_factory=list)
    """what the report's first page says of it"""


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "seed"), counted(2000, "step")
        ('1 seed', '2,000 steps')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def read_json(path: Path) -> dict[str, Any]:
    """Raises LionError where the file is no JSON object, as one that was cut short."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LionError(f"{path} cannot be read ({error}): was its run cut short? Make it again") from error
    if not isinstance(content, dict):
        raise LionError(f"{path} holds no object: it is not what the tool wrote")
    return content


def read_svg(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "<svg" not in text:
        raise LionError(f"{path} is missing or empty: make it again with the tool that wrote the results beside it")
    return text[text.index("<svg") :]


def toy_rates(folder: Path, hardware: str) -> Finding:
    """Table 1: the slope with the corollaries' own hyperparameters."""
    result = read_json(folder / "result.json")
    table, held, inside = [["problem", "$K$", "exponent of $K$ [95 %]", "the rate's"]], True, 0
    for name in ("constrained", "unconstrained"):
        found = result[name]["corollary"]
        steps = [row["steps"] for row in found["rows"]]
        held &= abs(found["slope"] + 0.25) <= 0.02
        inside += found["slope_low"] <= -0.25 <= found["slope_high"]
        interval = f"{found['slope']:.4f} [{found['slope_low']:.4f}, {found['slope_high']:.4f}]"
        table.append([name, f"{min(steps):,} to {max(steps):,}", interval, "-0.25"])
    words = "Held on the toy problem" if held else "Not held on the toy problem"
    return Finding(
        verdict=rf"{words}: with the corollaries' own $\beta_1$, $\beta_2$ and $\eta$, slopes within 0.02 of -0.25 "
        "were asked for. A rate is a theorem; a run can only agree with it, and two dimensions say nothing about $d$.",
        made=f"the toy problem of appendix A.1.1, its own Gaussian noise; {hardware}",
        tables=[table],
        pictures={"The corollaries' runs": read_svg(folder / "corollary.svg")},
        judgements=[
            Judgement(
                claim=r"LION's $\ell_1$ norm falls as $\sqrt{d} K^{-1/4}$",
                verdict=f"the power of $K$ {'agrees' if held else 'does not agree'} within 0.02 on the toy problem; "
                f"$-1/4$ is inside {inside} of 2 intervals. Nothing shown about $d$",
                basis="toy problem, d = 2, the corollaries' hyperparameters",
                numbers="exponents " + ", ".join(f"{row[0]} {row[2]}" for row in table[1:]),
            )
        ],
    )


def toy_pictures(folder: Path, hardware: str) -> Finding:
    """Figure A1."""
    minimum, lowest = read_json(folder / "result.json")["minimum"]
    held = round(minimum, 3) == 2.125 and round(lowest, 3) == 1.884
    numbers = rf"minima at $\pm {minimum:.6f}$, $f^* = {lowest:.6f}$"
    return Finding(
        verdict=f"{'Held' if held else 'Not held'}: {numbers}.",
        made=f"computed, float64; {hardware}",
        pictures={
            "(a) surface": read_svg(folder / "A1a_surface.svg"),
            "(b) contours": read_svg(folder / "A1b_contours.svg"),
        },
        judgements=[
            Judgement(
                claim=r"minima at $(0, \pm 2.125)$ and $(\pm 2.125, 0)$ with $f^* = 1.884$",
                verdict="holds to the digits given" if held else "does not hold",
                basis="toy problem, float64",
                numbers=numbers,
            )
        ],
    )


def toy_bound(folder: Path, hardware: str) -> Finding:
    """Figure A2."""
    result = read_json(folder / "result.json")
    table, over = [["problem", "largest left / right", "at $k$", "above the bound for $k$", "at the end"]], []
    for name in ("constrained", "unconstrained"):
        share = result[name]["paper"]["averaged"]
        above = "never" if share["over_from"] is None else f"{share['over_from']} to {share['over_to']}"
        over += [name] if share["over_from"] is not None else []
        cells = [f"{share['largest']:.3f}", str(share["at"]), above, f"{share['at_the_end']:.3f}"]
        table.append([name, *cells])
    verdict = f"Held in part: the left side is above the right for some $k$ ({', '.join(over)})" if over else "Held"
    return Finding(
        verdict=rf"{verdict}. $\eta = 0.01$ and the default $\beta_1$, $\beta_2$ are not the corollaries', which do "
        "not promise the bound for them.",
        made=f"5 starts x 5 repeats, 2,000 steps, the package's own update rule in float64; {hardware}",
        pictures={
            "(a) in the box": read_svg(folder / "A2a_constrained.svg"),
            "(b) without it": read_svg(folder / "A2b_unconstrained.svg"),
        },
        tables=[table],
        judgements=[
            Judgement(
                claim="the left sides of (9) and (13) agree with the theory's rate",
                verdict=_judged_bound(over, [float(row[-1]) for row in table[1:]]),
                basis=r"toy problem, d = 2, $\eta = 0.01$, 2,000 steps, 5 starts x 5 repeats",
                numbers="left / right, largest and at the end: "
                + ", ".join(f"{name} {largest} and {end}" for name, largest, *_, end in table[1:]),
            )
        ],
    )


def _judged_bound(over: list[str], at_the_end: list[float]) -> str:
    if max(at_the_end) > 1.0:
        return "does not hold at the end"
    return f"holds at the end, not for every $k$ ({', '.join(over)})" if over else "holds for every $k$"


def scaling(folder: Path, hardware: str) -> Finding:
    """The exponent of r against d."""
    result = read_json(folder / "scaling.json")
    model = result.get("model", "gpt").upper()
    table = [["optimizer", "step", "sizes", "exponent [95 %]", "0.5 inside"]]
    for fit in result["fits"]:
        interval = f"{fit['exponent']:.3f} [{fit['low']:.3f}, {fit['high']:.3f}]"
        inside = "yes" if fit["holds_half"] else "no"
        table.append([fit["optimizer"], str(fit["iteration"]), str(fit["sizes"]), interval, inside])
    inside, of = sum(fit["holds_half"] for fit in result["fits"]), len(result["fits"])
    sizes = sorted({point["d"] for point in result["points"]})
    shares = [point["ratio_over_sqrt_d"] for point in result["points"] if point["converged"]]
    few = f"{len(sizes)} sizes up to {sizes[-1] / sizes[0]:.0f} times the smallest: intervals this wide show little"
    missing = [few] if len(sizes) < 5 or sizes[-1] < 100 * sizes[0] else []
    thin = sum(fit["sizes"] < len(sizes) for fit in result["fits"])
    missing += [f"{thin} of {len(result['fits'])} fits lack sizes whose rounds did not converge"] if thin else []
    return Finding(
        verdict=rf"{model}: 0.5 is inside {inside} of {of} intervals; $r / \sqrt{{d}}$ of converged rounds "
        f"is between {min(shares):.3f} and {max(shares):.3f}.",
        made=f"{model}s of {len(sizes)} sizes, d = {sizes[0]:,} to {sizes[-1]:,}; {hardware}",
        pictures={
            f"{model}: $r$ against $d$": read_svg(folder / "exponent.svg"),
            rf"{model}: $r / \sqrt{{d}}$ over training": read_svg(folder / "ratio_over_sqrt_d.svg"),
        },
        tables=[table],
        missing=missing,
        judgements=[_judged_scaling(result["fits"], f"{model}s of {len(sizes)} sizes", sizes)],
    )


def _judged_scaling(fits: list[dict[str, Any]], models: str, sizes: list[int]) -> Judgement:
    """Intervals wider than ``WIDEST`` neither confirm nor refute an exponent."""
    inside = sum(fit["holds_half"] for fit in fits)
    narrow = sum(fit["high"] - fit["low"] <= WIDEST for fit in fits)
    if inside < len(fits):
        verdict = f"does not hold at every step: 0.5 is outside {len(fits) - inside} of {len(fits)} intervals"
    else:
        verdict = f"not refuted: 0.5 is inside all of {len(fits)} intervals"
    exponents = [fit["exponent"] for fit in fits]
    return Judgement(
        claim=r"$r = \Theta(\sqrt{d})$ all through training",
        verdict=f"{verdict}. Narrower than {WIDEST}: {narrow}",
        basis=f"{models}, d = {sizes[0]:,} to {sizes[-1]:,}, 1 seed",
        numbers=f"exponents {min(exponents):.3f} to {max(exponents):.3f}",
    )


def language(pair: dict[str, Path], model: str, hardware: str) -> Finding:
    """Figure 2 or 3 from the folders of one model's runs by optimizer: log.txt and norm_ratio.jsonl in each."""
    logs, rounds, missing = _read_pair(pair)
    missing += [f"no {name} run of {model}" for name in ("lion", "sgd") if name not in pair]
    both = [name for name in ("lion", "sgd") if name in logs and name in rounds]
    if not both:
        raise LionError("; ".join(missing))
    table = [["optimizer", "last step", "training loss", "test loss", r"$r / \sqrt{d}$", "rounds that converged"]]
    losses = {}
    for name in both:
        log, records = logs[name], rounds[name]
        last = sorted(log.loss)[-5:]
        losses[name] = statistics.mean(log.loss[step] for step in last)
        shares = [r["ratio_over_sqrt_d"] for r in records if r["converged"]]
        span = f"{min(shares):.3f} to {max(shares):.3f}" if shares else "none converged"
        test = f"{log.final['test']:.4f}" if "test" in log.final else "-"
        converged = f"{sum(bool(r['converged']) for r in records)} of {len(records)}"
        table.append([name, str(last[-1]), f"{losses[name]:.4f}", test, span, converged])
    d, steps = rounds[both[0]][0]["d"], logs[both[0]].iterations
    if len(both) < 2:
        verdict, judgements = "Cannot be said: only one optimizer.", []
    else:
        held = losses["lion"] < losses["sgd"]
        verdict = (
            rf"{'Held' if held else 'Not held'} for the training loss (mean of the last five logged). One size says "
            r"nothing about $\sqrt{d}$."
        )
        basis = f"{model}, d = {d:,}, {counted(steps, 'step')}, 1 seed"
        judgements = [_judged_pair(losses["lion"], losses["sgd"], basis)]
    return Finding(
        verdict=verdict,
        made=f"{model}, d = {d:,}, {counted(steps, 'step')}; {hardware}",
        pictures={
            f"{model}: losses on the left, $r$ on the right": drawings.loss_and_ratio(
                {n: logs[n] for n in both}, {n: rounds[n] for n in both}
            )
        },
        tables=[table],
        missing=missing,
        judgements=judgements,
    )


def _read_pair(
    pair: dict[str, Path],
) -> tuple[dict[str, TrainingLog], dict[str, list[dict[str, Any]]], list[str]]:
    """Log and rounds by optimizer, without runs that mix sizes, and what was wrong, in words."""
    logs: dict[str, TrainingLog] = {}
    rounds: dict[str, list[dict[str, Any]]] = {}
    missing: list[str] = []
    for name, folder in pair.items():
        try:
            logs[name] = read_training_log(folder / "log.txt")
            rounds[name] = read_records(folder / "norm_ratio.jsonl")
        except LionError as error:
            missing.append(str(error))
            continue
        if len(sizes := sorted({record["d"] for record in rounds[name]})) > 1:
            missing.append(f"{folder}/norm_ratio.jsonl mixes runs: d = {' and '.join(map(str, sizes))}; it is left out")
            del logs[name], rounds[name]
        elif max(logs[name].loss) < logs[name].iterations:
            log = logs[name]
            missing.append(f"{folder} was cut short: {max(log.loss)} of {log.iterations} steps")
    return logs, rounds, missing


def _judged_pair(lion: float, sgd: float, basis: str) -> Judgement:
    """Of one short run of each optimizer, by their last training losses."""
    return Judgement(
        claim=r"LION is better throughout, and $r = \Theta(\sqrt{d})$",
        verdict=f"{'LION' if lion < sgd else 'SGD'} ends lower in one short run, which shows little; one d says "
        "nothing about its root",
        basis=basis,
        numbers=f"last training loss: LION {lion:.3f}, SGD {sgd:.3f}",
    )
