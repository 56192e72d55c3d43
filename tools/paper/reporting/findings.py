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
from tools.paper.reporting.formulas import SQRT_D
from tools.paper.reporting.paper import Table
from tools.paper.studies import figures

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
    plain: str = ""
    """a sentence for the page's first lines, if it is one of the main results"""


@dataclass
class Finding:
    """Ours beside one exhibit of the paper."""

    verdict: str
    """whether the claim held, in a sentence"""
    made: str
    """model, data, steps, hardware"""
    about: str = ""
    """which of several findings of one exhibit it is, such as ``at the paper's rates``"""
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


def sentence(words: str) -> str:
    """``words`` with a capital letter, as a sentence begins."""
    return words[:1].upper() + words[1:]


def how_much(held: int, of: int) -> str:
    """How much of a claim holds, from in how many of some comparisons it does.

    Example:
        >>> how_much(2, 2), how_much(1, 2), how_much(0, 2)
        ('holds', 'holds in part', 'does not hold')
    """
    return "holds" if held == of else "holds in part" if held else "does not hold"


def in_one_seed(held: int, of: int) -> str:
    """:func:`how_much` of a claim was seen in the only seed.

    Example:
        >>> in_one_seed(2, 2), in_one_seed(1, 2), in_one_seed(0, 2)
        ('seen in one seed', 'seen in part in one seed', 'not seen in one seed')
    """
    return f"{'seen' if held == of else 'seen in part' if held else 'not seen'} in one seed"


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


def scaling(folder: Path, hardware: str) -> Finding:
    """The exponent of r against d."""
    result = read_json(folder / "scaling.json")
    model = result.get("model", "gpt").upper()
    table = [["optimizer", "step", "sizes", "exponent [95 %]", "0.5 inside"]]
    for fit in result["fits"]:
        interval = f"{fit['exponent']:.3f} [{fit['low']:.3f}, {fit['high']:.3f}]"
        inside = "yes" if fit["holds_half"] else "no"
        table.append([figures.NAMES[fit["optimizer"]], str(fit["iteration"]), str(fit["sizes"]), interval, inside])
    sizes = sorted({point["d"] for point in result["points"]})
    shares = [point["ratio_over_sqrt_d"] for point in result["points"] if point["converged"]]
    few = f"{len(sizes)} sizes up to {sizes[-1] / sizes[0]:.0f} times the smallest: intervals this wide show little"
    missing = [few] if len(sizes) < 5 or sizes[-1] < 100 * sizes[0] else []
    thin = sum(fit["sizes"] < len(sizes) for fit in result["fits"])
    missing += [f"{thin} of {len(result['fits'])} fits lack sizes whose rounds did not converge"] if thin else []
    judged = _judged_scaling(result["fits"], f"{model}s of {len(sizes)} sizes", sizes)
    return Finding(
        verdict=rf"{model}: {judged.verdict}. $r / \sqrt{{d}}$ of converged rounds is between {min(shares):.3f} and "
        f"{max(shares):.3f}.",
        made=f"{model}s of {len(sizes)} sizes, d = {sizes[0]:,} to {sizes[-1]:,}; {hardware}",
        pictures={
            f"{model}: $r$ against $d$": read_svg(folder / "exponent.svg"),
            rf"{model}: $r / \sqrt{{d}}$ over training": read_svg(folder / "ratio_over_sqrt_d.svg"),
        },
        tables=[table],
        missing=missing,
        judgements=[judged],
    )


def _judged_scaling(fits: list[dict[str, Any]], models: str, sizes: list[int]) -> Judgement:
    """Intervals that all include 0.5 decide nothing where one is wider than ``WIDEST``."""
    inside, of = sum(fit["holds_half"] for fit in fits), len(fits)
    narrow = sum(fit["high"] - fit["low"] <= WIDEST for fit in fits)
    word = "undecided" if inside == of and narrow < of else in_one_seed(inside, of)
    exponents = [fit["exponent"] for fit in fits]
    return Judgement(
        claim=r"$r = \Theta(\sqrt{d})$ all through training",
        verdict=f"{word}: 0.5 is inside {inside} of {of} intervals. Narrower than {WIDEST}: {narrow}",
        basis=f"{models}, d = {sizes[0]:,} to {sizes[-1]:,}, 1 seed",
        numbers=f"exponents {min(exponents):.3f} to {max(exponents):.3f}",
    )


def language(pair: dict[str, Path], model: str, hardware: str) -> Finding:
    """Figure 2 or 3 from the folders of one model's runs by optimizer: log.txt and norm_ratio.jsonl in each."""
    logs, rounds, missing = _read_pair(pair)
    missing += [f"no {name.upper()} run of {model}" for name in ("lion", "sgd") if name not in pair]
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
        table.append([name.upper(), str(last[-1]), f"{losses[name]:.4f}", test, span, converged])
    d, steps = rounds[both[0]][0]["d"], logs[both[0]].iterations
    if len(both) < 2:
        verdict, judgements = "Not established: only one optimizer has a run.", []
    else:
        basis = f"{model}, d = {d:,}, {counted(steps, 'step')}, 1 seed"
        judgements = [_judged_pair(losses["lion"], losses["sgd"], basis)]
        verdict = f"{sentence(judgements[0].verdict)}. The last training loss is the mean of the last five logged."
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
        verdict=f"{in_one_seed(int(lion < sgd), 1)}: {'LION' if lion < sgd else 'SGD'} ends lower in training loss. "
        f"One short run shows little. One size says nothing about {SQRT_D}",
        basis=basis,
        numbers=f"last training loss: LION {lion:.3f}, SGD {sgd:.3f}",
    )
