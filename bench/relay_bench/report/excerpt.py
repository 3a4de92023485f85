"""Plots of a page, alone in an SVG file: for a README, or a chat."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLOT: Final = re.compile(r'<svg viewBox="0 0 (\d+) (\d+)" role="img" aria-label="([^"]*)">(.*?)</svg>')
_TITLE_HEIGHT: Final = 26
#: As the page has it, for a background that may be dark.
_STYLE: Final = (
    "text{font-family:system-ui,sans-serif;fill:#626a76}.tick{font-size:11px}.label{font-size:12px}"
    ".title{font-size:14px;font-weight:600;fill:#1c1f24}.marktext{font-size:11.5px;fill:#b00020}"
    ".grid{stroke:#dfe3e8;stroke-width:1}.mark{stroke:#b00020;stroke-width:1.2;stroke-dasharray:4 3}"
)


def excerpt(document: str, titles: Sequence[str]) -> str:
    """The plots of a page with these titles, one below the other. Raises `ValueError`."""
    plots = {plot[3]: plot for plot in _PLOT.finditer(document)}
    parts: list[str] = []
    width = height = 0
    for title in titles:
        if title not in plots:
            raise ValueError(f"there is no plot {title!r}; there are: {', '.join(map(repr, plots))}")
        plot = plots[title]
        parts.append(f'<text class="title" x="10" y="{height + 18}">{title}</text>')
        parts.append(f'<g transform="translate(0 {height + _TITLE_HEIGHT})">{plot[4]}</g>')
        width = max(width, int(plot[1]))
        height += _TITLE_HEIGHT + int(plot[2])
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>{paper}{"".join(parts)}</svg>\n'
