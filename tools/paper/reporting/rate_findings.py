"""What tools/paper/rate_constants.py left: the constants of figure A3 and the perplexities of table A1."""

import statistics
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError
from tools.paper.reporting.findings import Finding, Judgement, read_json, read_svg
from tools.paper.reporting.formulas import C_LION, C_SGD, SQRT_D
from tools.paper.reporting.paper import Table
from tools.paper.studies.rates import below_from, rate_of, trusted

RECORD = "rates.json"
PAPERS = {"lion": "0.701", "sgd": "1.365"}
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
    made = f"{model}, d = {lion['d']:,}, {lion['steps'][-1]} steps, {lion['repeats']} seeds; {hardware}"
    return compared(found, made, {caption: read_svg(folder / "A3.svg")})


def compared(found: dict[str, Any], made: str, pictures: dict[str, str]) -> Finding:
    """c_LION and c_SGD as :func:`tools.paper.studies.rates.constants` gives them, and the paper's."""
    lion, sgd = found["lion"], found["sgd"]
    verb = _verdict(lion, sgd)
    numbers = f"{C_LION} = {lion['constant']:.3f}, {C_SGD} = {sgd['constant']:.3f}"
    norms = (
        f"{C_LION} is of the l1 norm over {SQRT_D}, which is never above the l2 norm; in l2, as {C_SGD} is, Lion's is"
    )
    return Finding(
        verdict=f"{verb}: {numbers}. {norms} {lion['l2_constant']:.3f}. {_reservations(lion, sgd)}",
        made=made,
        pictures=pictures,
        tables=[_constants_table(found)],
        judgements=[
            Judgement(
                claim=CLAIM,
                verdict=verb.lower(),
                basis=made,
                numbers=f"{numbers}; LION's in the l2 norm {lion['l2_constant']:.3f}",
            )
        ],
    )


def _verdict(lion: dict[str, Any], sgd: dict[str, Any]) -> str:
    """Established only where both norms of Lion have the same order and no constant is decided by the last step."""
    orders = {lion[key] < sgd["constant"] for key in ("constant", "l2_constant")}
    if len(orders) > 1 or any(_is_of_last_step(entry) for entry in (lion, sgd)):
        return "Not established"
    return "Held" if orders == {True} else "Not held"


def _is_of_last_step(entry: dict[str, Any]) -> bool:
    return bool(entry["at_step"] == entry["steps"][-1])


def _constants_table(found: dict[str, Any]) -> Table:
    table = [["", "ours", "the paper's", "in the l2 norm", "decided at step", "learning rate", "converged"]]
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
    verb = "Held" if found["lion_lower"] == found["seeds"] else "Not held"
    lrs = [result["rates"][name].get("lr") for name in ("sgd", "lion")]
    rates = f" SGD's rate is {lrs[0] / lrs[1]:.0f} times Lion's here, in the paper 10 times." if all(lrs) else ""
    numbers = f"Lion's first is below SGD's last in {found['lion_lower']} of {found['seeds']} seeds"
    made = f"tiny GPT, ln perplexity per token, {found['seeds']} seeds; {hardware}"
    claim = "LION's first checkpoint has a lower perplexity than SGD's last"
    return Finding(
        verdict=f"{verb}: {numbers}; Lion is below it {below_from(found)}.{rates}",
        made=made,
        tables=[table, each],
        judgements=[Judgement(claim=claim, verdict=verb.lower(), basis=made, numbers=numbers)],
    )
