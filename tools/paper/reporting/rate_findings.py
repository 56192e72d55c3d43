"""What tools/paper/rate_constants.py left: the constants of figure A3 and the perplexities of table A1."""

import statistics
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from tools.paper.reporting.findings import (
    Finding,
    Judgement,
    counted,
    how_much,
    in_one_seed,
    read_json,
    read_svg,
    sentence,
)
from tools.paper.reporting.formulas import C_LION, C_SGD
from tools.paper.reporting.paper import L2, Table
from tools.paper.studies.rates import below_from, rate_of, trusted

RECORD = "rates.json"
PAPERS = {"lion": "0.701", "sgd": "1.365"}
L1_OVER_ROOT = r"$\ell_1 / \sqrt{d}$"
CLAIM = f"{C_LION} is below {C_SGD}"


def constants(folder: Path, hardware: str) -> Finding:
    """Figure A3."""
    result = read_json(folder / RECORD)
    found = result["rates"]
    if len(found) < 2:
        raise LionError(f"{folder / RECORD} has {', '.join(found)} alone: both optimizers are needed")
    model = result.get("model", "tiny GPT")
    rates = " and ".join(f"{found[name]['lr']:g}" for name in PAPERS if found[name].get("lr"))
    caption = f"(a) and (b): {model}" + f", learning rates {rates}" * bool(rates)
    lion = found["lion"]
    made = f"{model}, d = {lion['d']:,}, {lion['steps'][-1]} steps, {counted(lion['repeats'], 'seed')}; {hardware}"
    return compared(found, made, {caption: read_svg(folder / "A3.svg")})


def compared(found: dict[str, Any], made: str, pictures: dict[str, str]) -> Finding:
    """c_LION and c_SGD as :func:`tools.paper.studies.rates.constants` gives them, and the paper's."""
    lion, sgd = found["lion"], found["sgd"]
    verdict = _verdict(lion, sgd)
    numbers = f"{C_LION} = {lion['constant']:.3f}, {C_SGD} = {sgd['constant']:.3f}"
    norms = f"{C_LION} uses {L1_OVER_ROOT}, which is at most {L2}. In {L2}, as for {C_SGD}, LION's constant is"
    return Finding(
        verdict=f"{sentence(verdict)}: {numbers}. {norms} {lion['l2_constant']:.3f}. {_reservations(lion, sgd)}",
        made=made,
        pictures=pictures,
        tables=[_constants_table(found)],
        judgements=[
            Judgement(
                claim=CLAIM,
                verdict=verdict,
                basis=made,
                numbers=f"{numbers}. In {L2}, LION's constant is {lion['l2_constant']:.3f}",
            )
        ],
    )


def _verdict(lion: dict[str, Any], sgd: dict[str, Any]) -> str:
    """Established only where both norms of LION have the same order and no constant is decided by the last step."""
    orders = {lion[key] < sgd["constant"] for key in ("constant", "l2_constant")}
    if len(orders) > 1 or any(_is_of_last_step(entry) for entry in (lion, sgd)):
        return "not established"
    return (in_one_seed if lion["repeats"] == 1 else how_much)(int(orders == {True}), 1)


def _is_of_last_step(entry: dict[str, Any]) -> bool:
    return bool(entry["at_step"] == entry["steps"][-1])


def _constants_table(found: dict[str, Any]) -> Table:
    table = [["", "ours", "the paper's", f"in {L2}", "decided at step", "learning rate", "converged"]]
    for name, theirs in PAPERS.items():
        entry = found[name]
        cells = [f"{entry['constant']:.4f}", theirs, f"{entry['l2_constant']:.4f}", str(entry["at_step"])]
        table.append([{"lion": C_LION, "sgd": C_SGD}[name], *cells, rate_of(entry), trusted(entry)])
    return table


def _reservations(lion: dict[str, Any], sgd: dict[str, Any]) -> str:
    """How far the constants can be trusted."""
    if lion.get("exact") and sgd.get("exact"):
        text = "Each norm is that of the whole training set's gradient, after each epoch."
    else:
        text = "Noise adds to the norms of rounds that did not converge: the constants are estimates from above."
    at_end = [name for name, entry in ((C_LION, lion), (C_SGD, sgd)) if _is_of_last_step(entry)]
    return text + "".join(
        f" {name} is decided by the last step: a longer run can have a larger one." for name in at_end
    )


def perplexities(folder: Path, hardware: str) -> Finding:
    """Table A1."""
    result = read_json(folder / RECORD)
    found = result.get("perplexity")
    if not found:
        raise LionError(
            f"{folder / RECORD} has no perplexities: run tools/paper/rate_constants.py with --evaluate FILE"
        )
    steps = found["steps"]
    table = [["tiny GPT", *(f"step {step}" for step in steps)]]
    for name in ("sgd", "lion"):
        means = map(statistics.mean, zip(*found[name], strict=True))
        table.append([f"{name.upper()}, mean", *(f"{value:.3f}" for value in means)])
    each = [["seed", f"LION at {steps[0]}", f"SGD at {steps[-1]}"]]
    for seed, (lion, sgd) in enumerate(zip(found["lion"], found["sgd"], strict=True), start=1):
        each.append([str(seed), f"{lion[0]:.3f}", f"{sgd[-1]:.3f}"])
    verdict = _first_below_last(found["lion_lower"], found["seeds"])
    lrs = [result["rates"][name].get("lr") for name in ("sgd", "lion")]
    rates = f" SGD's rate is {lrs[0] / lrs[1]:.0f} times LION's here, in the paper 10 times." if all(lrs) else ""
    numbers = f"LION's first is below SGD's last in {found['lion_lower']} of {counted(found['seeds'], 'seed')}"
    made = f"tiny GPT, ln perplexity per token, {counted(found['seeds'], 'seed')}; {hardware}"
    claim = "LION's first checkpoint has a lower perplexity than SGD's last"
    return Finding(
        verdict=f"{sentence(verdict)}: {numbers}; LION is below it {below_from(found)}.{rates}",
        made=made,
        tables=[table, each],
        judgements=[Judgement(claim=claim, verdict=verdict, basis=made, numbers=numbers)],
    )


def _first_below_last(lower: int, seeds: int) -> str:
    """Of the claim, from in how many seeds LION's first perplexity is below SGD's last."""
    if seeds == 1:
        return in_one_seed(lower, 1)
    return how_much(lower, seeds) if lower in (0, seeds) else "not established"
