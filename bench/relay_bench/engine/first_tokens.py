"""Times to the first token, as the engine counts them."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

#: vLLM's bounds of ``vllm:time_to_first_token_seconds``.
_BOUNDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)


class TimesToFirstToken:
    """A histogram, in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One request's."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: str) -> list[str]:
        """In Prometheus's text format."""
        found, so_far = [], 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._counts, strict=True):
            so_far += count
            found.append(f'{name}_bucket{{{labels},le="{bound}"}} {so_far}')
        return [*found, f"{name}_count{{{labels}}} {so_far}", f"{name}_sum{{{labels}}} {self._sum}"]

    def __repr__(self) -> str:
        return f"<TimesToFirstToken {sum(self._counts)}>"
