"""The hand in which every picture of ours is drawn."""

from html import escape

STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.title{font-weight:600}.small{font-size:11px}"
    ".middle{text-anchor:middle}.end{text-anchor:end}"
)
GOOD, BAD = (38, 118, 130), (202, 90, 62)
"""Red, green and blue of what is to be seen, and of what is in its way."""


def text(x: float, y: float, said: str, classes: str = "") -> str:
    """``said`` at a place, in pixels."""
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{escape(said)}</text>'
