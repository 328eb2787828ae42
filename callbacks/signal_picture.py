"""Renders rollouts with each token coloured by D_t, as a self-contained HTML page and as an image."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FULL_COLOUR = 2.0
"""|D_t| in nats from which a colour is fully saturated."""

# Ends of a diverging, colour-blind safe scale: orange against the teacher, blue with it.
AGAINST, WITH = (240, 140, 50), (110, 170, 235)


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
    """A rollout scored by the teacher."""

    name: str
    prompt: str
    context: str
    advantage: float
    tokens: list[Token]


def colour(asymmetry: float) -> tuple[int, int, int]:
    """Background colour of a token: white at 0, orange if the student went against the teacher, blue if with it."""
    strength = min(1.0, abs(asymmetry) / FULL_COLOUR)
    end = AGAINST if asymmetry > 0 else WITH
    red, green, blue = (round(255 + strength * (e - 255)) for e in end)
    return red, green, blue


# -- HTML ----------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ccc; padding: .8rem 0 }
h2 { font-size: 1rem; margin: .2rem 0 }
pre, .tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 }
.tokens span { border-radius: 3px; padding: 2px 0 }
summary { cursor: pointer; color: #555 }
.scale { display: inline-block; width: 12rem; height: .9rem; margin: 0 .5rem; vertical-align: middle }
"""


def html_page(title: str, rollouts: list[Scored]) -> str:
    """A page without external resources, each token coloured by D_t and with its values in a tooltip."""
    stops = ", ".join(_css(colour(FULL_COLOUR * x / 4)) for x in range(-4, 5))
    sections = "\n".join(_section(rollout) for rollout in rollouts)
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: reversed signal</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}: where the student departed from the teacher</h1>"
        "<p>Correct rollouts; each token is coloured by D = log P<sub>S</sub> − log P<sub>T</sub>. "
        f'With the teacher<span class="scale" style="background:linear-gradient(to right,{stops})"></span>'
        f"against it (full colour from {FULL_COLOUR:g} nats). Hover over a token for its values.</p>\n"
        f"{sections}\n</body></html>\n"
    )


def _section(rollout: Scored) -> str:
    tokens = "".join(
        f'<span style="background:{_css(colour(t.asymmetry))}" title="{_numbers(t)}">{html.escape(t.text)}</span>'
        for t in rollout.tokens
    )
    return (
        f"<section><h2>{html.escape(rollout.name)} · A = {rollout.advantage:+.2f}</h2>"
        f"{_details('prompt', rollout.prompt)}{_details('context of the teacher', rollout.context)}"
        f'<div class="tokens">{tokens}</div></section>'
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


def _css(rgb: tuple[int, int, int]) -> str:
    return f"rgb({rgb[0]},{rgb[1]},{rgb[2]})"


Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"

# -- image ---------------------------------------------------------------------------------------------------------

_WIDTH, _MARGIN, _LINE, _LINES_EACH = 1200, 24, 34, 12
_GREY, _BLACK = (110, 110, 110), (25, 25, 25)


def draw(title: str, rollouts: list[Scored]) -> np.ndarray:
    """The same content as an image, uint8 [H, W, 3]. Long rollouts are cut off after `_LINES_EACH` lines."""
    page = Image.new("RGB", (_WIDTH, 150 + len(rollouts) * (_LINES_EACH + 4) * _LINE), "white")
    pen = ImageDraw.Draw(page)
    heading, body, small = (ImageFont.load_default(size) for size in (26, 21, 17))

    pen.text((_MARGIN, 20), f"{title}: where the student departed from the teacher", _BLACK, heading)
    pen.text((_MARGIN, 62), "with the teacher", _GREY, small)
    for x in range(200):
        pen.line((_MARGIN + 135 + x, 62, _MARGIN + 135 + x, 82), colour(FULL_COLOUR * (x - 100) / 100))
    pen.text((_MARGIN + 345, 62), f"against it   (D = log P_S - log P_T, full from {FULL_COLOUR:g} nats)", _GREY, small)

    y = 110
    for rollout in rollouts:
        for line in (f"A = {rollout.advantage:+.2f}   {rollout.prompt}", f"context   {rollout.context}"):
            pen.text((_MARGIN, y), _shorten(" ".join(line.split()), pen, small), _GREY, small)
            y += 24
        y = _draw_tokens(pen, body, rollout.tokens, y + 2) + _LINE + 14
    return np.asarray(page.crop((0, 0, _WIDTH, y)))


def _draw_tokens(pen: ImageDraw.ImageDraw, font: Font, tokens: list[Token], y: int) -> int:
    x, last = float(_MARGIN), y + (_LINES_EACH - 1) * _LINE
    for token in tokens:
        for i, part in enumerate(token.text.split("\n")):
            if i:
                x, y = _MARGIN, y + _LINE
            width = pen.textlength(part, font)
            if x + width > _WIDTH - _MARGIN:
                x, y = _MARGIN, y + _LINE
            if y > last:
                pen.text((_MARGIN, last + 24), "…", _GREY, font)
                return last + 20
            if part:
                pen.rectangle((x, y, x + width, y + 27), colour(token.asymmetry))
                pen.text((x, y), part, _BLACK, font)
            x += width
    return y


def _shorten(text: str, pen: ImageDraw.ImageDraw, font: Font) -> str:
    available = _WIDTH - 2 * _MARGIN
    if pen.textlength(text, font) <= available:
        return text
    while text and pen.textlength(text + "…", font) > available:
        text = text[: -max(1, len(text) // 50)]
    return text + "…"
