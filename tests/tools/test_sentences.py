"""Sentences of many scripts, and in linear time."""

import pytest
from corpus.sentences import split_sentences

SENTENCES = {
    "Polish": (4, "Mieszkam w Polsce. Łódź jest duża. Śnieg padał. Żaba skacze."),
    "Turkish": (3, "İstanbul güzel. Çok iyi! Şimdi gel."),
    "Greek": (3, "Ζω στην Αθήνα. Έλα εδώ. Άλλη μέρα!"),
    "Russian and Ukrainian": (4, "Он ушёл. Ёлка стоит. Їжак біжить. Ґанок є."),
    "Armenian": (3, "Ես գնացի\u0589 Նա եկավ\u0589 Ինչու."),
    "Georgian": (3, "მე ვარ. ის არის. სახლი."),
    "Spanish": (4, "¿Qué es? ¡Nada! ¿Y él? Nada."),
    "German": (4, "Er sagte: „Ja.“ „Nein!“ Dann ging er. »Gut.«"),
    "French": (3, "Il dit «Oui.» «Non.» Puis rien."),
    "Hindi": (3, "क्या है? यह है। वह है।"),
    "Arabic": (3, "مرحبا؟ هذا جيد. نعم"),
    "Hebrew": (2, "זה טוב. זה רע."),
    "Japanese": (3, "これは。それは。はい"),
    "no sentence's end": (1, "See v1.2. it goes on, e.g. this one; or x.y."),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_end_in_every_script(language: str) -> None:
    count, text = SENTENCES[language]
    found = split_sentences(text)
    assert len(found) == count
    assert " ".join(found).replace("。 ", "。") == text


@pytest.mark.parametrize("unit", [".", ". ", '."', "J. R. ", ".)", "!?", "\n ", '. "', "mr. A "])
def test_splitting_takes_linear_time(unit: str) -> None:
    """At 200,000 characters, a way that takes quadratic time does not come to an end within the hour."""
    assert "".join("".join(split_sentences(unit * (200_000 // len(unit)))).split()) == unit.replace(" ", "").strip() * (
        200_000 // len(unit)
    )
