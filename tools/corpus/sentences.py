"""Split a document into sentences by rules, for BERT's sentence-order loss."""

import re

# Words before a full stop that does not end a sentence.
_ABBREVIATIONS_TEXT = """
mr mrs ms dr prof rev gen col lt sgt capt st jr sr vs etc e.g i.e cf al fig figs no nos vol vols pp ed eds inc ltd co
corp dept univ approx ca jan feb mar apr jun jul aug sep sept oct nov dec mt ft u.s u.k
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS_TEXT.split())
# Quotes and brackets, which open a sentence in one language and close it in another.
_OPENING = "\"'\u00ab\u00bb\u2018\u201a\u201b\u201c\u201d\u201e\u201f\u2039\u203a([{\u00bf\u00a1\u300c\u300e"
_CLOSING = "\"'\u00ab\u00bb\u2018\u2019\u201c\u201d\u2039\u203a)]}"
# A run of end marks, closing quotes and brackets behind it, then blanks, then something that can begin a sentence; or
# the full-width marks of Chinese and Japanese, which no blank follows. A run is looked at once, from its first
# mark on (possessive, and not behind another mark): otherwise a long one takes quadratic time.
_END = ".!?\u2026\u203d\u0589\u061f\u06d4\u0964\u0965\u1362"
_BOUNDARY = re.compile(
    f"(?<![{_END}])([{_END}]++)([{re.escape(_CLOSING)}]*+)(\\s++)(?=[{re.escape(_OPENING)}]*+(\\w))"
    "|([\u3002\uff01\uff1f]+[\u300d\u300f\uff09]*)"
)
_BLANK_LINE = re.compile(r"\n\s*\n")


def split_sentences(text: str, keep_newlines: bool = False) -> list[str]:
    """Return the sentences of ``text`` in order, none of them empty; nothing but blanks between them is dropped.

    A sentence ends at . ! ?, an ellipsis and the end marks of other scripts (before blanks and anything but a small
    letter), at the full-width marks and at a blank line; not after a known abbreviation or a single letter. Other line
    breaks inside a sentence become blanks, unless ``keep_newlines``. Time is linear in the text. Rules, not a trained
    model: Megatron's preprocess_data.py uses NLTK's Punkt, which needs a download.
    """
    sentences = []
    for paragraph in _BLANK_LINE.split(text):
        begin = 0
        for match in _BOUNDARY.finditer(paragraph):
            if match[5] is None and not _can_begin(match[4]):
                continue
            if match[1] == "." and _is_abbreviation(paragraph[max(begin, match.start() - 20) : match.start()]):
                continue
            sentences.append(paragraph[begin : match.end(5) if match[5] else match.end(2)])
            begin = match.end()
        sentences.append(paragraph[begin:])
    cleaned = (part.strip() if keep_newlines else " ".join(part.split()) for part in sentences)
    return [part for part in cleaned if part]


def _can_begin(first: str) -> bool:
    """Whether a sentence can begin with this letter or digit: in scripts without capitals, with any letter.

    Georgian has capitals, but does not use them in sentences: its letters count as small ones.
    """
    return first.isalnum() and (not first.islower() or "\u10d0" <= first <= "\u10ff")


def _is_abbreviation(before: str) -> bool:
    words = before.split()  # the last 20 characters of the sentence: no abbreviation is longer
    word = words[-1].strip(_OPENING).lower() if words else ""
    return word in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i")
