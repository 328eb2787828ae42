"""Renders rollouts with each token coloured by D_t, as a self-contained HTML page and as an image."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FULL_COLOUR = 2.0
"""|D_t| in nats from which a colour is fully saturated."""

VISIBLE = 0.1
"""|D_t| in nats from which a colour can be told from white."""

# Ends of a diverging, colour-blind safe scale: orange against the teacher, blue with it.
AGAINST, WITH = (240, 140, 50), (110, 170, 235)

Colour: TypeAlias = "tuple[int, int, int]"
Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"


@dataclass(frozen=True)
class Token:
    """A response token with its log-probs under student and teacher, in nats. The asymmetry is their difference,
    log P_S - log P_T."""

    text: str
    asymmetry: float
    logp_student: float
    logp_teacher: float
    weight: float
    advantage: float


@dataclass(frozen=True)
class Scored:
    """A rollout with the values of its tokens. The context is None if the teacher did not score it."""

    name: str
    prompt: str
    context: str | None
    advantage: float
    tokens: list[Token]

    @property
    def strongest(self) -> Token | None:
        """The token with the largest |D_t|; None if no token is coloured."""
        token = max(self.tokens, key=lambda token: abs(token.asymmetry), default=None)
        return token if token and abs(token.asymmetry) >= VISIBLE else None


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Args:
        title: The epoch, its method and its reward.
        remark: How the rollouts were chosen, or why no token is coloured.
        against: What the method does with tokens that are less likely for the teacher than for the student; empty if
            there are none.
        with_teacher: The same for tokens that are more likely for the teacher.
        rollouts: The rollouts.
    """

    title: str
    remark: str
    against: str
    with_teacher: str
    rollouts: list[Scored]

    @property
    def legend(self) -> list[tuple[Colour, str]]:
        """The colours in use and their meaning."""
        meanings = [
            (AGAINST, "less likely for the teacher than for the student", self.against),
            (WITH, "more likely for the teacher than for the student", self.with_teacher),
        ]
        return [(rgb, f"{meaning}: {effect}") for rgb, meaning, effect in meanings if effect]


def colour(asymmetry: float) -> Colour:
    """Background colour of a token: white at 0, orange if the student went against the teacher, blue if with it."""
    strength = min(1.0, abs(asymmetry) / FULL_COLOUR)
    end = AGAINST if asymmetry > 0 else WITH
    red, green, blue = (round(255 + strength * (e - 255)) for e in end)
    return red, green, blue


def explain(rollout: Scored) -> str:
    """The probabilities of the token with the largest |D_t|, and its credit relative to the rollout's advantage."""
    token = rollout.strongest
    if token is None:
        return ""
    student, teacher = (_percent(logp) for logp in (token.logp_student, token.logp_teacher))
    word = token.text.strip() or repr(token.text)
    text = f"“{word}”: {student} for the student, {teacher} for the teacher"
    if token.advantage and rollout.advantage:
        text += f"; its credit is {token.advantage / rollout.advantage:.2f} times the rollout's"
    return text


def _percent(logp: float) -> str:
    share = 100 * float(np.exp(logp))
    return f"{share:.0f} %" if share >= 9.5 else f"{share:.1f} %" if share >= 0.1 else "below 0.1 %"


# -- HTML ----------------------------------------------------------------------------------------------------------

_HOVER = f"<br>Full colour from {FULL_COLOUR:g} nats. Hover over a token for its values."

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ccc; padding: .8rem 0 }
h2 { font-size: 1rem; margin: .2rem 0 }
pre, .tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 }
.tokens span { border-radius: 3px; padding: 2px 0 }
summary, .label { color: #555 }
summary { cursor: pointer }
.swatch { display: inline-block; width: 1.6rem; height: .9rem; margin-right: .5rem; vertical-align: middle }
"""


def html_page(picture: Picture) -> str:
    """A page without external resources, each token coloured by D_t and with its values in a tooltip. Its `nav` is
    empty; `link_pages` links it with the pages of other epochs."""
    legend = "".join(
        f'<br><span class="swatch" style="background:{_css(rgb)}"></span>{html.escape(text)}'
        for rgb, text in picture.legend
    )
    sections = "\n".join(_section(rollout) for rollout in picture.rollouts)
    title = html.escape(picture.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><nav></nav><h1>{title}</h1>"
        f"<p>{html.escape(picture.remark)}{legend}{legend and _HOVER}</p>\n{sections}\n</body></html>\n"
    )


def _section(rollout: Scored) -> str:
    scored = rollout.context is not None
    tokens = "".join(
        f'<span style="background:{_css(colour(t.asymmetry))}" title="{_numbers(t) if scored else ""}">'
        f"{html.escape(t.text)}</span>"
        for t in rollout.tokens
    )
    context = "" if rollout.context is None else _details("only the teacher saw", rollout.context)
    return (
        f"<section><h2>{html.escape(rollout.name)} · A = {rollout.advantage:+.2f}</h2>"
        f"{_details('problem', rollout.prompt)}{context}"
        f'<div class="label">the student wrote</div><div class="tokens">{tokens}</div>'
        f'<div class="label">{html.escape(explain(rollout))}</div></section>'
    )


def _numbers(token: Token) -> str:
    student, teacher = round(token.logp_student, 4), round(token.logp_teacher, 4)
    # D from the rounded log-probs, so that the displayed values add up.
    return (
        f"D {student - teacher:+.4f}   log P_S {student:.4f}   log P_T {teacher:.4f}   weight {token.weight:.2f}   "
        f"A_t {token.advantage:+.2f}"
    )


def _details(summary: str, text: str) -> str:
    """A collapsible section, open if the text is short."""
    opened = " open" if len(text) < 200 else ""
    return f"<details{opened}><summary>{summary}</summary><pre>{html.escape(text)}</pre></details>"


def _css(rgb: Colour) -> str:
    return f"rgb({rgb[0]},{rgb[1]},{rgb[2]})"


# -- image ---------------------------------------------------------------------------------------------------------

_WIDTH, _MARGIN, _COLUMN, _LINE = 1200, 24, 250, 36
_LINES_OF_TEXT, _LINES_OF_TOKENS = 2, 12
_GREY, _BLACK, _RULE = (95, 95, 95), (20, 20, 20), (205, 205, 205)


class _Page:
    """An image that is written from top to bottom.

    Args:
        height: At least the height of everything that is written, in pixels.
    """

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (_WIDTH, height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.heading, self.body, self.small = (ImageFont.load_default(size) for size in (32, 25, 22))
        self.y = _MARGIN

    def write(self, text: str, ink: Colour = _BLACK, font: Font | None = None, x: int = _MARGIN) -> None:
        """Writes text with line breaks between words, at most `_LINES_OF_TEXT` lines."""
        words = re.findall(r"\s?\S{1,24}", " ".join(text.split()))
        self.flow([(word, None) for word in words], ink, font or self.small, x, _LINES_OF_TEXT)

    def row(self, label: str, text: str) -> None:
        """Writes a label in the left column and a text in the right one."""
        self.pen.text((_MARGIN, self.y), label, _GREY, self.small)
        self.write(text, _GREY, x=_COLUMN)

    def flow(self, pieces: Iterable[tuple[str, Colour | None]], ink: Colour, font: Font, left: int, lines: int) -> None:
        """Writes pieces of text one after the other, each on its background, and ends the line.

        Args:
            pieces: The texts and their backgrounds. A newline in a text breaks the line.
            ink: Colour of the text.
            font: Font of the text.
            left: Where lines begin, in pixels.
            lines: Number of lines; the rest is replaced by an ellipsis.
        """
        x, last = float(left), self.y + (lines - 1) * _LINE
        for text, background in pieces:
            for i, part in enumerate(text.split("\n")):
                width = self.pen.textlength(part, font)
                if i or x + width > _WIDTH - _MARGIN:
                    if self.y == last:
                        self.pen.text((min(x, _WIDTH - _MARGIN), self.y), "…", _GREY, font)
                        self.y += _LINE
                        return
                    x, self.y = left, self.y + _LINE
                    part = part if i else part.lstrip()  # after a newline, spaces are indentation
                    width = self.pen.textlength(part, font)
                self._piece(part, background, ink, font, x)
                x += width
        self.y += _LINE

    def _piece(self, text: str, background: Colour | None, ink: Colour, font: Font, x: float) -> None:
        if background and background != (255, 255, 255):
            word = text.lstrip() or text  # the space before a word stays white
            start = x + self.pen.textlength(text[: len(text) - len(word)], font)
            box = (start - 1, self.y, x + self.pen.textlength(text, font) + 1, self.y + _LINE - 6)
            self.pen.rounded_rectangle(box, 4, background)
        self.pen.text((x, self.y), text, ink, font)


def draw(picture: Picture) -> np.ndarray:
    """The same content as an image, uint8 [H, W, 3]. Long rollouts are cut off after `_LINES_OF_TOKENS` lines."""
    rows_each = _LINES_OF_TOKENS + 2 * _LINES_OF_TEXT + 4
    page = _Page(400 + len(picture.rollouts) * rows_each * _LINE)
    page.write(picture.title, font=page.heading)
    page.y += 8
    page.write(picture.remark)
    for rgb, text in picture.legend:
        page.pen.rounded_rectangle((_MARGIN, page.y, _MARGIN + 44, page.y + _LINE - 8), 4, rgb)
        page.write(text, x=_MARGIN + 60)
    for rollout in picture.rollouts:
        _draw_rollout(page, rollout)
    return np.asarray(page.image.crop((0, 0, _WIDTH, page.y + 16)))


def _draw_rollout(page: _Page, rollout: Scored) -> None:
    page.pen.line((_MARGIN, page.y + 10, _WIDTH - _MARGIN, page.y + 10), _RULE, 2)
    page.y += 24
    page.row("problem", rollout.prompt)
    if rollout.context is not None:
        page.row("only the teacher saw", rollout.context)
    page.pen.text((_MARGIN, page.y + 2), "the student wrote", _GREY, page.small)
    pieces = [(token.text, colour(token.asymmetry)) for token in rollout.tokens]
    page.flow(pieces, _BLACK, page.body, _COLUMN, _LINES_OF_TOKENS)
    if note := explain(rollout):
        page.row("", note)


def effects(rollouts: Sequence[Scored]) -> tuple[str, str]:
    """What a method did with tokens that are less likely for the teacher, and with those that are more likely: more,
    less or the same credit as the rollout's advantage. Empty if no such token is shown."""
    tokens = [(t.asymmetry, t.advantage - rollout.advantage) for rollout in rollouts for t in rollout.tokens]

    def effect(sign: int) -> str:
        changes = [change for asymmetry, change in tokens if sign * asymmetry >= VISIBLE]
        if not changes:
            return ""
        change = sum(changes)
        return "more credit" if change > 1e-6 else "less credit" if change < -1e-6 else "the same credit"

    return effect(1), effect(-1)
