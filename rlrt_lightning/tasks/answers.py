r"""Normalization of ground truths and answers before they are compared.

`truths` reads a ground truth of any type that a data file can hold. `canonical` converts an answer to LaTeX with one
spelling for each symbol and number, and with spaces only where they can separate two numbers.
"""

from __future__ import annotations

import json
import re
import unicodedata
from decimal import Decimal
from numbers import Integral, Rational, Real
from typing import Any

Truth = str | bool | Decimal
"""One correct answer."""


# -- ground truths -----------------------------------------------------------------------------------------------------


def truths(value: Any) -> list[Truth]:
    """The correct answers in a ground truth, without empty ones.

    Args:
        value: A string, a number, a bool, a list of these, any of which is correct, or verl's dict with a
            `ground_truth`.

    Raises:
        ValueError: If it holds anything else. The message completes a sentence that begins with "the answer".
    """
    return [truth for entry in entries(value) if (truth := _truth(entry)) is not None]


def entries(value: Any) -> list[Any]:
    """The entries of a ground truth without conversion, including empty ones."""
    while isinstance(value, dict):
        if "ground_truth" not in value:
            keys = ", ".join(str(key)[:40] for key in list(value)[:5]) or "none"
            raise ValueError(f"is a dict without a ground_truth (its keys: {keys})")
        value = value["ground_truth"]
    value = _native(value)
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _native(value: Any) -> Any:
    """Converts an array of any library to a list, or to a scalar if it has no dimensions. Scalars are left unchanged,
    since a float32 0.1 would become 0.10000000149011612."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, Real) else value


def _truth(entry: Any) -> Truth | None:
    """Converts one entry of a ground truth; None if it is empty or not finite."""
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
        number = Decimal(str(entry))  # the shortest decimal that parses to this float, not its binary value
        return number if number.is_finite() else None
    raise ValueError(f"is neither text nor a number but {type(entry).__name__}")


def as_text(truth: Truth) -> str:
    """A correct answer as text. Numbers have no exponent and no trailing zeros after the decimal point."""
    if not isinstance(truth, Decimal):
        return str(truth)
    text = f"{truth:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def readable(value: Any) -> str | None:
    """A ground truth as text, such as "5 or 7" if several answers are correct; None if it is empty."""
    try:
        found = truths(value)
    except ValueError:  # a custom task may use any type
        return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else str(value)
    return " or ".join(map(as_text, found)) or None


# -- numbers as text ---------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")


def number(text: str) -> Decimal | None:
    """Parses a number in programming-language notation (42, 42.0, 4.2e1); None if the text is not one."""
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def readings(text: str) -> list[str]:
    """Possible readings of a canonical answer: itself, and 0.002 for 2e-3 or 1440 for 1,440."""
    if ("e" in text or "E" in text) and (value := number(text)) is not None and abs(value.adjusted()) < 400:
        return [text, as_text(value)]
    if "," in text and "\\{" not in text and (whole := _ONE_GROUPED_BY_COMMA.fullmatch(text)):
        return [text, whole[1] + whole[2].replace(",", "") + whole[3]]
    return [text]


# -- spelling ----------------------------------------------------------------------------------------------------------

_BEFORE = str.maketrans(  # symbols that NFKC would replace by other symbols
    {"º": "°", "˚": "°", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}"}
    | {"ℂ": r"\mathbb{C}", "…": r"\ldots "}
)
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₒₓₙ]+")
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


def _to_latex(text: str) -> str:
    """Converts non-ASCII symbols to LaTeX: minus signs, ≠, π, ², ½, full-width digits, spaces of any width."""
    if text.isascii():
        return text
    text = text.translate(_BEFORE)
    text = _SUPERSCRIPTS.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _SUBSCRIPTS.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
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
        # Put single-digit arguments in braces, as TeX reads them, so that they do not look like part of a number.
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
_ADJACENT_NUMBERS = re.compile(r"(?<![0-9._^])[0-9.]*[0-9](?:\.? \.?|')[0-9]")


def canonical(answer: str) -> str:
    r"""Normalizes an answer (see `normalized`) and removes line breaks and math delimiters."""
    return normalized(_DELIMITER.sub(lambda m: m[1] or "", answer).replace("\n", " ")).strip()


def normalized(text: str) -> str:
    r"""Converts each symbol to one LaTeX spelling and mixed numbers to fractions, and removes digit grouping.

    Only groups of three digits count as digit grouping: `1 440`, `1\,440` and `1{,}440` become 1440, and `1 2` stays
    two numbers. A comma without braces may also separate two numbers: see `readings`.
    """
    text = _SET_COMMA.sub("{,}", _to_latex(text))
    text = _SPACING.sub(lambda m: m[1] or ("" if m[0] == r"\!" else " "), text)
    for pattern, replacement in _ALIASES:
        text = pattern.sub(replacement, text)
    text = re.sub(" {2,}", " ", text)
    text = _GROUPED.sub(lambda m: re.sub(r"[^0-9]", "", m[0]), text)
    text = _GROUPED_DECIMALS.sub(lambda m: m[0].replace(" ", ""), text)
    return _MIXED.sub(_improper, text).replace("{,}", ",")


def _improper(mixed: re.Match[str]) -> str:
    """Converts 3 1/2 to 7/2."""
    whole, above, below = (int(digits) for digits in mixed.groups() if digits is not None)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else mixed[0]


def has_adjacent_numbers(text: str) -> bool:
    """Whether a canonical text has two adjacent numbers, which could mean a number, a product or a sum."""
    return bool(_ADJACENT_NUMBERS.search(text))


def compact(text: str) -> str:
    """Removes spaces that do not separate numbers, and a final period, from a canonical text. Equal results are the
    same answer even if they cannot be parsed."""
    return re.sub(r"(?<![0-9.]) | (?![0-9.])", "", text).rstrip(". ")


_WORD = re.compile(r"(?:\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)\{)?([A-Za-z]{2,})\}?")
_BLANK = re.compile(r"(?:\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)(?![a-zA-Z])|[{}.,;:\s])*")


def is_blank(answer: str) -> bool:
    """Whether an answer has no content: whitespace, a period, empty braces."""
    return bool(_BLANK.fullmatch(canonical(answer)))


def same_text(truth: str, answer: str) -> bool:
    """Whether two canonical texts are equal; single words are compared case-insensitively."""
    truth, answer = compact(truth), compact(answer)
    if truth == answer:
        return True
    words = [word[1].casefold() for word in map(_WORD.fullmatch, (truth, answer)) if word]
    return len(words) == 2 and words[0] == words[1]
