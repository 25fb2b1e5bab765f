"""Break text into lines, and write numbers as a reader expects them."""

from __future__ import annotations

import textwrap


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` characters, and never between a number and its per cent sign."""
    kept = textwrap.wrap(text.replace(" %", "\xa0%"), width, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in kept]


def number(value: float, *, is_share: bool) -> str:
    """Return a value as text: a share in per cent with one decimal, anything else with three digits."""
    return f"{100 * value:.1f} %" if is_share else f"{value:.3g}"
