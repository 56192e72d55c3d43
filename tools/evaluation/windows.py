"""Text to evaluate on, the windows that score each of its tokens once, and the figures made of the sum."""

import math
import re
from dataclasses import dataclass
from typing import Any

from megatron_lion.config import LionError

FORMULAS = {
    "perplexity": "exp(nll / (tokens - 1))",
    "word_perplexity": "exp(nll / (words - 1)), Megatron's adjusted perplexity",
    "bits_per_byte": "nll / (ln 2 * bytes)",
    "nll": "sum over the tokens but the first of -ln p(token | up to a window of tokens before it)",
    "tokens": "tokens of the whole text as the model reads it",
    "words": "parts of the original text between single blanks, before detokenizing",
    "bytes": "UTF-8 bytes of the text as the model reads it",
}


def wikitext_detokenizer(text: str) -> str:
    """Undo WikiText's spacing (" @-@ ", " , ", "( a )"), so that it reads as ordinary text.

    Source: the rules that GPT-2's authors describe (invertible de-tokenizers) as Megatron-LM's
    tasks/zeroshot_gpt/detokenizer.py had them (core_r0.6.0), applied in the same order; its one rule that matches
    nothing ("/' [0-9]/" with literal slashes) is left out.
    """
    text = text.replace("s '", "s'")
    for mark, joined in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, joined)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(opening)}([^{re.escape(closing)}]*+){re.escape(closing)}"
        text = re.sub(inside, lambda match, a=opening, b=closing: f"{a}{match[1].strip()}{b}", text)
    for mark, joined in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u00b0 ", "\u00b0"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ):
        text = text.replace(mark, joined)
    return text


DETOKENIZERS = {"wikitext": wikitext_detokenizer, "none": lambda text: text}


def count_words(text: str) -> int:
    """Parts of the text between single blanks, as Megatron's evaluator counts T_o (line breaks are no blanks there)."""
    return len(text.strip().split(" "))


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` (exclusive) go in; the last ``scored`` of the tokens begin+1 .. end are scored."""

    begin: int
    end: int
    scored: int


def make_windows(tokens: int, length: int, step: int) -> list[Window]:
    """Return windows of at most ``length`` tokens, each begun ``step`` after the one before, over ``tokens`` tokens.

    Every token but the first is scored exactly once: all of the first window, and of each later one what no earlier one
    scored, so that a token has at least ``length - step`` tokens before it (fewer only at the text's beginning). Raises
    LionError for a step that would leave tokens out and for a text of one token.
    """
    if not 1 <= step <= length:
        raise LionError(f"--overlapping-eval {step} must be between 1 and the window's {length} tokens")
    if tokens < 2:
        raise LionError(f"a text of {tokens} tokens has none to predict: use a longer one")
    windows, scored_to = [], 0  # the last token that has been scored
    for begin in range(0, tokens - 1, step):
        end = min(begin + length, tokens - 1)
        windows.append(Window(begin, end, end - scored_to))
        scored_to = end
        if end == tokens - 1:
            break
    return windows


def figures(nll: float, *, tokens: int, words: int, size: int) -> dict[str, Any]:
    """Return the perplexities, their logarithms and the bits per byte; FORMULAS says how each comes about.

    Args:
        nll: the sum of all scored tokens' losses, in nats, float64.
        tokens, words, size: counts of the text, see FORMULAS ("size" is its bytes).
    """
    log_perplexity, log_word_perplexity = nll / (tokens - 1), nll / max(words - 1, 1)
    return {
        "log_perplexity": log_perplexity,
        "perplexity": _exp(log_perplexity),
        "log_word_perplexity": log_word_perplexity,
        "word_perplexity": _exp(log_word_perplexity),
        "bits_per_byte": nll / (math.log(2) * size),
        "nll": nll,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a row for each step; its third column is the one of the paper's table A1, or the fifth."""
    lines = [
        "| step | perplexity | ln perplexity | word perplexity | ln word perplexity | bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for step, row in sorted(results.items(), key=lambda item: int(item[0])):
        lines.append(
            f"| {step} | {row['perplexity']:.4g} | {row['log_perplexity']:.4f} | {row['word_perplexity']:.4g} "
            f"| {row['log_word_perplexity']:.4f} | {row['bits_per_byte']:.4f} |"
        )
    return "\n".join(lines)
