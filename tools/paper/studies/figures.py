"""How the studies' figures look, and that the same numbers give the same bytes."""

import io
from pathlib import Path
from typing import Any

COLORS = {"lion": "#1f5fa8", "sgd": "#c0392b", "adam": "#2e8b57", "start": "#555555"}
NAMES = {"lion": "LION", "sgd": "SGD", "adam": "Adam", "start": "before the first step"}


def pyplot() -> Any:
    """matplotlib.pyplot without a display, set up for SVG files that do not change from run to run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "studies", "figure.constrained_layout.use": True, "font.size": 10})
    return plt


def svg(figure: Any) -> str:
    """``figure`` as an SVG element without a date. Closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Any, path: Path) -> Path:
    """Write ``figure`` as SVG without a date, close it and return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
    return path
