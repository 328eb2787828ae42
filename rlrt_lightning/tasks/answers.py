r"""Ground truths and answers as they are compared: the one place that decides what a value or a text stands for.

`truths` reads a ground truth of any type that a data file can hold. `canonical` writes an answer in LaTeX with one
spelling of each symbol and number, and with spaces only where they can separate two numbers.
"""

from __future__ import annotations

import json
import re
import unicodedata
from decimal import Decimal
from numbers import Integral, Rational, Real
from typing import Any

Truth = str | bool | Decimal
"""One right answer."""


# -- ground truths -----------------------------------------------------------------------------------------------------


def truths(value: Any) -> list[Truth]:
    """The right answers that a ground truth holds, without empty ones. It is a text, a number, a truth value, a list
    of these, any of which is right, or verl's dict with a `ground_truth`.

    Raises:
        ValueError: If it holds anything else; says what, as the rest of a sentence that begins with "the answer".
    """
    return [truth for entry in entries(value) if (truth := _truth(entry)) is not None]


def entries(value: Any) -> list[Any]:
    """The entries of a ground truth as they are, empty ones too."""
    while isinstance(value, dict):
        if "ground_truth" not in value:
            keys = ", ".join(str(key)[:40] for key in list(value)[:5]) or "none"
            raise ValueError(f"is a dict without a ground_truth (its keys: {keys})")
        value = value["ground_truth"]
    value = _native(value)
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _native(value: Any) -> Any:
    """An array of any library as a list, or as its one value. Its numbers stay: 0.1 of 32 bits is no 0.1 of 64."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, Real) else value


def _truth(entry: Any) -> Truth | None:
    """One entry of a ground truth; None if it is empty or not finite."""
    entry = _native(entry)
    if entry is None:
        return None
    if isinstance(entry, str):
        return str(entry).strip() or None
    if isinstance(entry, bool):
        return entry
    if isinstance(entry, Integral):
        return Decimal(int(entry))
    if isinstance(entry, Rational):
        return str(entry)
    if isinstance(entry, (Decimal, Real)):
        number = Decimal(str(entry))  # the shortest decimal that reads back as this float, not its binary value
        return number if number.is_finite() else None
    raise ValueError(f"is neither text nor a number but {type(entry).__name__}")


def as_text(truth: Truth) -> str:
    """A right answer as text; numbers in digits, without an exponent or zeros at the end of a fraction."""
    if not isinstance(truth, Decimal):
        return str(truth)
    text = f"{truth:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def readable(value: Any) -> str | None:
    """A ground truth in words, "5 or 7" where several answers are right; None if it is empty."""
    try:
        found = truths(value)
    except ValueError:  # of a task of the user's own
        return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else str(value)
    return " or ".join(map(as_text, found)) or None


# -- numbers as text ---------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")


def number(text: str) -> Decimal | None:
    """The number that a text is in a programming language's spelling (42, 42.0, 4.2e1), or None."""
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def readings(text: str) -> list[str]:
    """What a canonical answer may mean: itself; the number 0.002 where it is 2e-3; 1440 where it is 1,440."""
    if ("e" in text or "E" in text) and (value := number(text)) is not None and abs(value.adjusted()) < 400:
        return [text, as_text(value)]
    if "," in text and "\\{" not in text and (whole := _ONE_GROUPED_BY_COMMA.fullmatch(text)):
        return [text, whole[1] + whole[2].replace(",", "") + whole[3]]
    return [text]


# -- spelling ----------------------------------------------------------------------------------------------------------

_BEFORE = str.maketrans(  # what Unicode's own normal form would make another symbol of
    {"º": "°", "˚": "°", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}"}
    | {"ℂ": r"\mathbb{C}", "…": r"\ldots "}
)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₒₓₙ]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")

_AFTER = str.maketrans(
    dict.fromkeys("−‐‑‒–﹣", "-")
    | dict.fromkeys("×✕✖⨯", r"\times ")
    | dict.fromkeys("·⋅∙•", r"\cdot ")
    | dict.fromkeys("∕⁄", "/")
    | dict.fromkeys("≤≦⩽", r"\le ")
    | dict.fromkeys("≥≧⩾", r"\ge ")
    | dict.fromkeys("∅⌀", r"\emptyset ")
    | {"∗": "*", "÷": r"\div ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty "}
    | {"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "⊂": r"\subset ", "⊆": r"\subseteq "}
    | {"∖": r"\setminus ", "°": r"^\circ ", "∘": r"\circ ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "→": r"\to "}
    | {"’": "'", "、": ",", "。": ".", "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle "}
    | {"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "}
    | dict(zip("αβγδεζηθικλμνξπρστυφχψω", [
        rf"\{name} " for name in (
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi "
            "psi omega"
        ).split()
    ], strict=True))
)  # fmt: skip


def _in_latex(text: str) -> str:
    """A text whose symbols beyond ASCII are LaTeX: minus signs, ≠, π, ², ½, full-width digits, spaces of any width."""
    if text.isascii():
        return text
    text = text.translate(_BEFORE)
    text = _RAISED.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _VULGAR.sub(lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    text = unicodedata.normalize("NFKC", text).translate(_AFTER)
    text = re.sub(r"(\\sqrt(?:\[3\])?) \(([^()]*)\)", r"\1{\2}", text)
    text = re.sub(r"(\\sqrt(?:\[3\])?) ([0-9.]+)", r"\1{\2}", text)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text if unicodedata.category(c) != "Cf")


_DELIMITER = re.compile(r"(\\\\|\\\$)|\$|\\[()\[\]]")
_SPACING = re.compile(
    r"(\\\\)|\\!|(?:\\[,;: ]|\{\\[,;: ]\}|\\(?:q?quad|enspace|thinspace|medspace|thickspace)(?![a-zA-Z])|~(?!=)"
    r"|\\[hm]space\*?\{[^{}]*\}|\\(?:text|mbox|mathrm)\{\s*\}|[^\S\n])+"
)
_ALIASES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right) ?\.|\\(?:left|right|[bB]igg?[lr]?|(?:display|text)style)(?![a-zA-Z]) ?", ""),
        (r"\\neq?(?![a-zA-Z]) ?|\\not ?=|!=|<>", r"\\ne "),
        (r"\\not ?\\in(?![a-zA-Z])", r"\\notin"),
        (r"\\le(?:q|qq|qslant)?(?![a-zA-Z]) ?|<=", r"\\le "),
        (r"\\ge(?:q|qq|qslant)?(?![a-zA-Z]) ?|>=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"\^?\\degree(?![a-zA-Z])|\^ ?\{ ?\\circ ?\}", r"^\\circ"),
        (r"\^ ?(-[0-9]+)", r"^{\1}"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\\{ ?\\\}", r"\\emptyset "),
        (r"([\])]) ?U ?(?=[\[(])", r"\1 \\cup "),
        (r"(?<![a-zA-Z\\{])pi(?![a-zA-Z])", r"\\pi "),
        # Arguments of one digit in braces, as TeX reads them, so that no digit looks like a part of a number.
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(frac|binom) ?([0-9]) ?([0-9])", r"\\\1{\2}{\3}"),
        (r"\\(frac|binom) ?([0-9]) ?\{", r"\\\1{\2}{"),
        (r"\\(frac|binom) ?(\{[^{}]*\}) ?([0-9])", r"\\\1\2{\3}"),
        (r"\\sqrt ?([0-9])", r"\\sqrt{\1}"),
    ]
]

_SET_COMMA = re.compile(r"(?:\{ ?, ?\}(?: ?\\!)?|, ?\\!) ?(?=[0-9])")
_GROUPED = re.compile(
    r"(?<![0-9._^])(?<![0-9][ '])[0-9]{1,3}(?:(?: [0-9]{3})+|(?:'[0-9]{3})+|(?:\{,\}[0-9]{3})+)(?! ?/|[0-9])"
)
_GROUPED_DECIMALS = re.compile(r"(?<=[0-9])\.[0-9]{3}(?: [0-9]{3})+(?![0-9])")
_ONE_GROUPED_BY_COMMA = re.compile(r"([^,(\[]*(?<![0-9._^]))([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9])([^,]*)")
_MIXED = re.compile(
    r"(?<![0-9._^a-zA-Z])([0-9]{1,9}) ?(?:\\frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}|(?<= )([0-9]{1,9}) ?/ ?([0-9]{1,9}))"
    r"(?!\.?[0-9])"
)
_APART = re.compile(r"(?<![0-9._^])[0-9.]*[0-9](?:\.? \.?|')[0-9]")


def canonical(answer: str) -> str:
    r"""An answer in one spelling: see `respelled`; in one line, and without the signs that begin and end formulas."""
    return respelled(_DELIMITER.sub(lambda m: m[1] or "", answer).replace("\n", " ")).strip()


def respelled(text: str) -> str:
    r"""A text in which each symbol is in one spelling, LaTeX's; mixed numbers are fractions; numbers are not grouped.

    Only groups of three digits are grouping: `1 440`, `1\,440` and `1{,}440` are 1440, and `1 2` stays apart. A comma
    without braces may separate two numbers as well: see `readings`.
    """
    text = _SET_COMMA.sub("{,}", _in_latex(text))
    text = _SPACING.sub(lambda m: m[1] or ("" if m[0] == r"\!" else " "), text)
    for pattern, replacement in _ALIASES:
        text = pattern.sub(replacement, text)
    text = re.sub(" {2,}", " ", text)
    text = _GROUPED.sub(lambda m: re.sub(r"[^0-9]", "", m[0]), text)
    text = _GROUPED_DECIMALS.sub(lambda m: m[0].replace(" ", ""), text)
    return _MIXED.sub(_improper, text).replace("{,}", ",")


def _improper(mixed: re.Match[str]) -> str:
    """3 1/2 as 7/2."""
    whole, above, below = (int(digits) for digits in mixed.groups() if digits is not None)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else mixed[0]


def apart(text: str) -> bool:
    """Whether a canonical text has two numbers side by side: nobody knows if it is a number, a product or a sum."""
    return bool(_APART.search(text))


def plain(text: str) -> str:
    """A canonical text without the spaces that separate nothing, or its end's full stop: equal texts are the same
    answer even if nothing can parse them."""
    return re.sub(r"(?<![0-9.]) | (?![0-9.])", "", text).rstrip(". ")


_WORD = re.compile(r"(?:\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)\{)?([A-Za-z]{2,})\}?")
_BLANK = re.compile(r"(?:\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)(?![a-zA-Z])|[{}.,;:\s])*")


def blank(answer: str) -> bool:
    """Whether an answer says nothing: white space, a full stop, empty braces."""
    return bool(_BLANK.fullmatch(canonical(answer)))


def same_text(truth: str, answer: str) -> bool:
    """Whether two canonical texts are the same, a word in upper or lower case."""
    truth, answer = plain(truth), plain(answer)
    if truth == answer:
        return True
    words = [word[1].casefold() for word in map(_WORD.fullmatch, (truth, answer)) if word]
    return len(words) == 2 and words[0] == words[1]
