"""Token-frequency baseline: the loss of a model that ignores the context."""

from pathlib import Path

import numpy as np

from tools.paper.studies.long_text import VOCABULARY, LongText


def frequency_loss(text: LongText) -> float:
    """Mean of -ln p(token) over the fixed split, in nats, where p is (count + 1) / (tokens + vocabulary) in training.

    GPT's loss covers every token, so the two are comparable; BERT's covers only the masked ones.
    """
    counts = 1.0 + np.bincount(_tokens(text.folder / f"text_train_text_{text.kind.level}.bin"), minlength=VOCABULARY)
    return float(-np.log(counts / counts.sum())[_tokens(text.fixed_split.with_suffix(".bin"))].mean())


def _tokens(path: Path) -> "np.ndarray[tuple[int], np.dtype[np.uint16]]":
    """Megatron writes tokens of a vocabulary below 65,500 as 16 bits."""
    return np.fromfile(path, dtype=np.uint16)
