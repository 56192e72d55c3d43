"""Split a document into sentences by rules, for BERT's sentence-order loss."""

import re

# Words before a full stop that does not end a sentence.
_ABBREVIATIONS_TEXT = """
mr mrs ms dr prof rev gen col lt sgt capt st jr sr vs etc e.g i.e cf al fig figs no nos vol vols pp ed eds inc ltd co
corp dept univ approx ca jan feb mar apr jun jul aug sep sept oct nov dec mt ft u.s u.k
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS_TEXT.split())
# A run of end marks, closing quotes and brackets behind it, then blanks, then something that can begin a sentence; or
# the full-width marks of Chinese and Japanese, behind which no blank stands.
_OPENING = "\"'\u201c\u2018(["
_CLOSING = "\"'\u201d\u2019)\\]"
_BOUNDARY = re.compile(
    f"([.!?\u2026]+)([{_CLOSING}]*)(\\s+)(?=[{_OPENING[:-1]}\\[]*[A-Z0-9\u00c0-\u00de\u0391-\u03a9\u0410-\u042f])"
    "|([\u3002\uff01\uff1f]+[\u300d\u300f\uff09]*)"
)
_BLANK_LINE = re.compile(r"\n\s*\n")


def split_sentences(text: str, keep_newlines: bool = False) -> list[str]:
    """Return the sentences of ``text`` in order, none of them empty; nothing but blanks between them is dropped.

    A sentence ends at . ! ? and an ellipsis (before blanks and a capital or digit), at the full-width marks and at a
    blank line; not after a known abbreviation or a single letter. Other line breaks inside a sentence become blanks,
    unless ``keep_newlines``. Rules, not a trained model: Megatron's preprocess_data.py uses NLTK's Punkt, whose data
    has to be downloaded.
    """
    sentences = []
    for paragraph in _BLANK_LINE.split(text):
        begin = 0
        for match in _BOUNDARY.finditer(paragraph):
            if match[1] == "." and _is_abbreviation(paragraph[begin : match.start()]):
                continue
            sentences.append(paragraph[begin : match.end(4) if match[4] else match.end(2)])
            begin = match.end()
        sentences.append(paragraph[begin:])
    cleaned = (part.strip() if keep_newlines else " ".join(part.split()) for part in sentences)
    return [part for part in cleaned if part]


def _is_abbreviation(before: str) -> bool:
    words = before[-20:].split()  # no abbreviation is longer; the whole sentence would make this quadratic
    word = words[-1].strip(_OPENING).lower() if words else ""
    return word in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i")
