"""Pictures that the report draws itself, as SVG text: a row for each run's loss and ratio, as in the paper."""

import io
from typing import Any

from megatron_lion.training_log import TrainingLog
from tools.paper.studies import figures

LONG_COLORS = {"lion_paper": "#1f5fa8", "sgd_paper": "#c0392b", "sgd_paper_no_momentum": "#d98b1f", "adamw": "#2e8b57"}
LINES = ("-", "--", ":")  # by model; colors are the optimizers'
Records = list[dict[str, Any]]


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    figures.pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_and_ratio(logs: dict[str, TrainingLog], rounds: dict[str, Records]) -> str:
    """Training loss and that of the rounds on the left, r on the right (open: not converged)."""
    figure, (loss, ratio) = figures.pyplot().subplots(1, 2, figsize=(9.2, 3.6))
    for name, log in logs.items():
        color = {"color": figures.COLORS.get(name)}
        steps = sorted(log.loss)
        loss.plot(steps, [log.loss[step] for step in steps], label=figures.NAMES.get(name, name), **color)
        if log.validation:
            tested = sorted(log.validation)
            loss.plot(tested, [log.validation[step] for step in tested], "s", markersize=3, **color)
        records = [record for record in rounds[name] if record["ratio"] is not None]
        at = [record["iteration"] for record in records]
        ratio.plot(at, [record["ratio"] for record in records], linewidth=1.0, **color)
        for record in records:
            face = color["color"] if record["converged"] else "white"
            ratio.plot(record["iteration"], record["ratio"], "o", markerfacecolor=face, **color)
    d = next(iter(rounds.values()))[0]["d"]
    ratio.axhline(d**0.5, color="black", linewidth=0.8, label=r"$\sqrt{d}$")
    loss.set(xlabel="step", ylabel="loss (nats)")
    ratio.set(xlabel="step", ylabel=r"$r = \|g\|_1 / \|g\|_2$", ylim=(0, 1.1 * d**0.5))
    for axes in (loss, ratio):
        axes.grid(alpha=0.3)
        axes.legend()
    return _svg(figure)


def epochs(runs: dict[str, Records]) -> str:
    """Training loss, top-1 and r / sqrt(d) over epochs."""
    figure, panels = figures.pyplot().subplots(1, 3, figsize=(10.5, 3.4))
    titles = {"loss": "training loss", "top1": "top-1 accuracy", "ratio_over_sqrt_d": r"$r / \sqrt{d}$"}
    models = list(dict.fromkeys(rows[0]["model"] for rows in runs.values()))
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for name, rows in runs.items():
            line = "o" + LINES[models.index(rows[0]["model"])]
            (drawn,) = axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], line, markersize=3)
            drawn.set(color=figures.COLORS.get(rows[0]["optimizer"]), label=name)
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return _svg(figure)


def long_runs(groups: dict[str, Records], names: dict[str, str]) -> str:
    """Training loss (squares: held-out) on the left, r on the right (diamonds: exact), a band over the seeds."""
    figure, (loss, ratio) = figures.pyplot().subplots(1, 2, figsize=(9.2, 3.8))
    for name, records in groups.items():
        color = LONG_COLORS[name]
        steps = [int(step) for step in records[0]["training_loss"]]
        _band(loss, steps, [list(one["training_loss"].values()) for one in records], color, names[name])
        for one in records:
            tested = one["validation_loss"]
            loss.plot([int(step) for step in tested], list(tested.values()), "s", markersize=3, color=color)
        rounds = [_ratios(one["rounds"]) for one in records]
        _band(ratio, records[0]["rounds"]["iteration"], rounds, color, names[name])
        for one in records:
            exact = {int(step): entry["ratio"] for step, entry in one["exact"].items()}
            ratio.plot(list(exact), list(exact.values()), "D", markersize=4, color=color)
    d = next(iter(groups.values()))[0]["d"]
    ratio.axhline(d**0.5, color="black", linewidth=0.8, label=r"$\sqrt{d}$")
    loss.set(xlabel="step", ylabel="loss (nats)", title="training loss; squares: held-out text")
    ratio.set(
        xlabel="step", ylabel=r"$r = \|g\|_1 / \|g\|_2$", ylim=(0, 1.1 * d**0.5), title="diamonds: exact gradient"
    )
    for axes in (loss, ratio):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _svg(figure)


def _ratios(rounds: dict[str, list[float]]) -> list[float]:
    return [l1 / l2 for l1, l2 in zip(rounds["l1"], rounds["l2"], strict=True)]


def _band(axes: Any, steps: list[int], values: list[list[float]], color: str, label: str) -> None:
    """The mean over the seeds, and the area between the smallest and the largest."""
    each = list(zip(*values, strict=True))
    axes.plot(steps, [sum(at) / len(at) for at in each], color=color, linewidth=1.2, label=label)
    axes.fill_between(steps, [min(at) for at in each], [max(at) for at in each], color=color, alpha=0.25, linewidth=0)
