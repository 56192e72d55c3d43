r"""Formulas of the report: a small LaTeX subset in ``$...$``, as MathML in HTML and unchanged in Markdown.

Understood are letters, numbers, operators, ``_``, ``^``, groups in braces, ``\frac{}{}``, ``\sqrt{}``, ``\mathrm{}``, a
norm in a pair of ``\Vert``, and the names in ``SYMBOLS`` and ``FUNCTIONS``. Of LaTeX's punctuation such as ``\|`` and
``\,`` nothing is used: Markdown would drop its backslashes.
"""

import html
import re

FORMULA = re.compile(r"\$([^\s$](?:[^$]*[^\s$])?)\$(?!\d)")
TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:[.,]\d+)*|[A-Za-z]|[^\s]")
LETTERS = {"theta": "θ", "lambda": "λ", "beta": "β", "eta": "η", "sigma": "σ", "Theta": "Θ", "ell": "ℓ"}  # noqa: RUF001
OPERATORS = {"le": "≤", "ge": "≥", "pm": "±", "times": "×", "approx": "≈", "nabla": "∇", "ldots": "…", "propto": "∝"}  # noqa: RUF001
SYMBOLS = LETTERS | OPERATORS
# Replacements that write a formula in plain letters, in this order.
LETTERED = (
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1 / \2"),
    (r"\\mathrm\{([^{}]*)\}", r"\1"),
    (r"\\Vert (.*?) ?\\Vert", r"||\1||"),
    (r"\\([A-Za-z]+)", r"\1"),
    (r"\{([^{}]*)\}", r"(\1)"),
)
# Formulas of several findings.
SQRT_D, SHARE = r"$\sqrt{d}$", r"$r / \sqrt{d}$"
C_LION, C_SGD = r"$c_{\mathrm{LION}}$", r"$c_{\mathrm{SGD}}$"
FUNCTIONS = ("cos", "sin", "ln", "log", "min", "max")


def with_mathml(text: str) -> str:
    """``text`` escaped for HTML, with MathML for its formulas. Raises ValueError for a formula outside the subset."""
    parts = FORMULA.split(text)  # text and formula in turn
    return "".join(mathml(part) if index % 2 else html.escape(part) for index, part in enumerate(parts))


def to_plain(text: str) -> str:
    """``text`` with formulas in letters, for titles and the descriptions of pictures."""
    return FORMULA.sub(lambda found: _in_letters(found[1]), text)


def mathml(formula: str) -> str:
    r"""A formula without its dollar signs as an inline ``<math>`` element.

    Raises ValueError for what is not in the subset.

    Example:
        >>> mathml(r"\sqrt{d}")
        '<math><msqrt><mi>d</mi></msqrt></math>'
    """
    return f"<math>{_Parser(formula).row(until=None)}</math>"


def _in_letters(formula: str) -> str:
    for pattern, letters in LETTERED:
        formula = re.sub(pattern, letters, formula)
    return formula


class _Parser:
    """Tokens of one formula, read from left to right."""

    def __init__(self, formula: str) -> None:
        self.formula, self.tokens = formula, TOKEN.findall(formula)

    def row(self, until: str | None) -> str:
        """Everything up to ``until``, which is taken too; up to the end without it."""
        found = []
        while self.tokens and self.tokens[0] != until:
            found.append(self._with_scripts())
        if until is not None:
            self._take(until)
        return "".join(found)

    def _with_scripts(self) -> str:
        """One item with the subscript and the superscript behind it."""
        base, scripts = self._item(), {}
        while self.tokens and self.tokens[0] in ("_", "^"):
            kind = self.tokens.pop(0)
            if kind in scripts:
                raise self._error(f"a second {kind}")
            scripts[kind] = self._item()
        tag = {"_": "msub", "^": "msup", "_^": "msubsup"}.get("".join(sorted(scripts, reverse=True)))
        if tag is None:
            return base
        return f"<{tag}>{base}{scripts.get('_', '')}{scripts.get('^', '')}</{tag}>"

    def _item(self) -> str:
        token = self._take()
        if token == "{":
            return f"<mrow>{self.row(until='}')}</mrow>"
        if token.startswith("\\"):
            return self._command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token[0].isalpha() and token.isascii():
            return f"<mi>{token}</mi>"
        if token in "+-=<>()[],;:/.'|!*":
            minus = "−" if token == "-" else html.escape(token)  # noqa: RUF001
            return f'<mo stretchy="false">{minus}</mo>' if token in "()[]|" else f"<mo>{minus}</mo>"
        raise self._error(repr(token))

    def _command(self, name: str) -> str:
        if name == "frac":
            return f"<mfrac>{self._group()}{self._group()}</mfrac>"
        if name == "sqrt":
            self._take("{")
            return f"<msqrt>{self.row(until='}')}</msqrt>"
        if name == "Vert":
            fence = '<mo fence="true" stretchy="false">‖</mo>'
            inner = self.row(until="\\Vert")
            return f"<mrow>{fence}{inner}{fence}</mrow>"
        if name == "mathrm":
            self._take("{")
            letters = ""
            while self.tokens and self.tokens[0] != "}":
                letters += self._take()
            self._take("}")
            return f'<mi mathvariant="normal">{letters}</mi>'
        if name in FUNCTIONS:
            return f"<mi>{name}</mi>"
        if name in LETTERS:
            return f"<mi>{LETTERS[name]}</mi>"
        if name in OPERATORS:
            return f"<mo>{OPERATORS[name]}</mo>"
        raise self._error(f"\\{name}")

    def _group(self) -> str:
        self._take("{")
        return f"<mrow>{self.row(until='}')}</mrow>"

    def _take(self, expected: str | None = None) -> str:
        if not self.tokens or expected not in (None, self.tokens[0]):
            raise self._error(f"no {expected or 'more'}" if not self.tokens else f"{self.tokens[0]!r}, not {expected}")
        return self.tokens.pop(0)

    def _error(self, what: str) -> ValueError:
        names = ", ".join(f"\\{name}" for name in ("frac", "sqrt", "mathrm", "Vert", *FUNCTIONS, *SYMBOLS))
        return ValueError(f"formula ${self.formula}$: {what}. Known are letters, numbers, _, ^, braces, {names}")
