"""The style that all SVG pictures of this package share."""

from html import escape

STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.title{font-weight:600}.small{font-size:11px}"
    ".middle{text-anchor:middle}.end{text-anchor:end}"
)
GOOD, BAD = (38, 118, 130), (202, 90, 62)
"""RGB of what is good or highlighted, and of what is bad."""


def text(x: float, y: float, content: str, classes: str = "") -> str:
    """A text element at ``x``, ``y`` in pixels."""
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{escape(content)}</text>'
