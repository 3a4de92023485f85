"""SVG by hand: a frame with axes, and what is drawn in it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from relay_bench.report.scale import Scale

#: Okabe and Ito's colours, told apart by nearly everyone and in grey.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 30, 10, 40


class Plot:
    """One plot: axes from two scales, and shapes in their units. `svg` is the whole of it."""

    def __init__(
        self, x: Scale, y: Scale, *, x_label: str, y_label: str, title: str, width: int = 660, height: int = 300
    ) -> None:
        self._x, self._y = x, y
        self._title = title
        self._size = width, height
        self._shapes: list[str] = []
        self._keys: list[tuple[str, str]] = []
        self._axes(x_label, y_label)

    def x(self, value: float) -> float:
        """Where a value is, in pixels from the left."""
        return _LEFT + self._x.place(value) * (self._size[0] - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Where a value is, in pixels from the top."""
        return _TOP + (1 - self._y.place(value)) * (self._size[1] - _TOP - _BOTTOM)

    def _axes(self, x_label: str, y_label: str) -> None:
        width, height = self._size
        right, bottom = width - _RIGHT, height - _BOTTOM
        for tick in self._x.ticks():
            at = self.x(tick)
            self._line(at, _TOP, at, bottom, "grid")
            self._text(at, bottom + 16, self._x.text(tick), "tick", "middle")
        for tick in self._y.ticks():
            at = self.y(tick)
            self._line(_LEFT, at, right, at, "grid")
            self._text(_LEFT - 6, at + 4, self._y.text(tick), "tick", "end")
        self._text((_LEFT + right) / 2, height - 4, x_label, "label", "middle")
        middle = (_TOP + bottom) / 2
        turned = f'transform="translate(12 {middle:.0f}) rotate(-90)"'
        self._shapes.append(f'<text class="label" text-anchor="middle" {turned}>{escape(y_label)}</text>')

    def key(self, name: str, colour: str) -> None:
        """Names a colour in the legend."""
        self._keys.append((name, colour))

    def path(
        self, points: Iterable[tuple[float, float]], colour: str, *, is_stepped: bool = False, dash: str = ""
    ) -> None:
        """A line through points, or a staircase."""
        words: list[str] = []
        for x, y in points:
            at_x, at_y = f"{self.x(x):.1f}", f"{self.y(y):.1f}"
            words.append(f"M{at_x} {at_y}" if not words else f"H{at_x}V{at_y}" if is_stepped else f"L{at_x} {at_y}")
        style = f' stroke-dasharray="{dash}"' if dash else ""
        self._shapes.append(f'<path d="{"".join(words)}" fill="none" stroke="{colour}" stroke-width="1.8"{style}/>')

    def dots(self, points: Iterable[tuple[float, float, str]], colour: str, radius: float = 2.5) -> None:
        """A dot for each point, with a text that shows under the pointer."""
        for x, y, text in points:
            self._shapes.append(
                f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius:g}" fill="{colour}" fill-opacity="0.75">'
                f"<title>{escape(text)}</title></circle>"
            )

    def bar(self, x0: float, x1: float, y: float, thickness: float, colour: str, text: str = "") -> None:
        """A horizontal bar from `x0` to `x1`, around `y`; `thickness` in pixels."""
        left, right = self.x(x0), self.x(x1)
        title = f"<title>{escape(text)}</title>" if text else ""
        self._shapes.append(
            f'<rect x="{left:.1f}" y="{self.y(y) - thickness / 2:.1f}" width="{max(right - left, 0.6):.1f}" '
            f'height="{thickness:.1f}" fill="{colour}">{title}</rect>'
        )

    def mark(self, x: float, text: str) -> None:
        """A vertical line with a word at it."""
        at = self.x(x)
        self._line(at, _TOP, at, self._size[1] - _BOTTOM, "mark")
        end = "end" if at > self._size[0] * 0.75 else "start"
        self._text(at + (-5 if end == "end" else 5), _TOP + 12, text, "marktext", end)

    def note(self, x: float, y: float, text: str, *, anchor: str = "start", dx: float = 0.0) -> None:
        """A word at a point."""
        self._text(self.x(x) + dx, self.y(y) + 4, text, "tick", anchor)

    def _line(self, x0: float, y0: float, x1: float, y1: float, kind: str) -> None:
        self._shapes.append(f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')

    def _text(self, x: float, y: float, text: str, kind: str, anchor: str) -> None:
        self._shapes.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def svg(self) -> str:
        """The plot with its title and legend."""
        width, height = self._size
        title = escape(self._title)
        caption = f"<figcaption>{title}{legend(self._keys)}</figcaption>"
        box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{title}"'
        return f"<figure>{caption}<svg {box}>{''.join(self._shapes)}</svg></figure>"


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """Names and their colours."""
    if not keys:
        return ""
    items = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in keys)
    return f'<span class="legend">{items}</span>'
