"""One figure as an SVG: a bar for each competitor, longest or shortest first, as is better. Standard library only.

The colours are readable on a white and on a dark page; a viewer that says which of them it has gets text to match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 720
_LABEL_WIDTH = 170
_VALUE_WIDTH = 110
_BAR_HEIGHT = 18
_STEP = 26
_TOP = 40
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #7d8590; }
.title { font-weight: 600; font-size: 14px; }
.bar { fill: #8c959f; }
.own { fill: #2f81f7; }
@media (prefers-color-scheme: light) { text { fill: #3d444d; } }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9; } .bar { fill: #768390; } }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float
    text: str  # the value as it is written beside the bar
    own: bool = False


def bars(title: str, rows: Sequence[Bar]) -> str:
    """The figure; the longest bar takes all the room there is."""
    longest = max((row.value for row in rows), default=0) or 1
    room = WIDTH - _LABEL_WIDTH - _VALUE_WIDTH
    height = _TOP + _STEP * len(rows) + 6
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="0" y="20">{escape(title)}</text>',
    ]
    for index, row in enumerate(rows):
        top = _TOP + index * _STEP
        length = max(1.0, room * row.value / longest)
        middle = top + _BAR_HEIGHT - 5
        lines += [
            f'<text x="{_LABEL_WIDTH - 8}" y="{middle}" text-anchor="end">{escape(row.label)}</text>',
            f'<rect class="{"own" if row.own else "bar"}" x="{_LABEL_WIDTH}" y="{top}" width="{length:.1f}"'
            f' height="{_BAR_HEIGHT}" rx="2"/>',
            f'<text x="{_LABEL_WIDTH + length + 6:.1f}" y="{middle}">{escape(row.text)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
