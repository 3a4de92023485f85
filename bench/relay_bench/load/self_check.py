"""The harness checked against times that are known: the built-in engine's, at 1, 50 and 500 streams.

Not a test of the suite, as it needs a machine with two cores to itself: a median that is off says that client and
engine got too little of it just as well as that one of them is wrong. What a run says of its own degradation tells
which.
"""

from __future__ import annotations

from typing import Final

import msgspec
from rich.table import Table

from relay_bench.load import floor

#: The engine's first token and step, and how many tokens an answer has.
FIRST_TOKEN_MS: Final = 100.0
STEP_MS: Final = 50.0
_TOKENS: Final = 40
STREAMS: Final = (1, 50, 500)

#: What a median may be off by: a share of the known time, or so many milliseconds.
_SHARE: Final = 0.05
_SLACK_MS: Final = 0.1


class Check(msgspec.Struct, frozen=True):
    """One median beside the known time."""

    streams: int
    what: str
    known_ms: float
    found_ms: float
    degraded: list[str] = []

    @property
    def is_good(self) -> bool:
        """Whether it is near enough."""
        return abs(self.found_ms - self.known_ms) <= max(_SHARE * self.known_ms, _SLACK_MS)


async def checked() -> list[Check]:
    """Loads an engine of its own. Raises `LoadError`."""
    found = []
    async with floor.running_engine("--ttft-ms", f"{FIRST_TOKEN_MS:g}", "--step-ms", f"{STEP_MS:g}") as (url, _):
        for streams in STREAMS:
            result = await floor.run_against(url, _words(streams))
            for what, metric, known_ms in (("first token", "ttft", FIRST_TOKEN_MS), ("gap", "frame_gap", STEP_MS)):
                found.append(
                    Check(streams, what, known_ms, result[f"median_{metric}_ms"], result["harness"]["degraded"])
                )
    return found


def _words(streams: int) -> tuple[str, ...]:
    """Requests at a constant rate that keeps so many streams open: a crowd at once would measure its own arrival."""
    seconds = (FIRST_TOKEN_MS + (_TOKENS - 1) * STEP_MS) / 1000
    rate = streams / seconds
    return (
        *("--request-rate", f"{rate:.3f}", "--burstiness", "inf", "--num-prompts", str(max(2 * streams, 5))),
        *("--random-output-len", str(_TOKENS)),
    )


def table_of(checks: list[Check]) -> Table:
    """For the terminal."""
    table = Table("streams", "median of", "known", "found", "off by", "", title="self-check")
    for check in checks:
        verdict = "ok" if check.is_good else "[red]off[/red]"
        off = f"{check.found_ms - check.known_ms:+.3f} ms"
        table.add_row(
            str(check.streams), check.what, f"{check.known_ms:g} ms", f"{check.found_ms:.3f} ms", off, verdict
        )
    for reason in dict.fromkeys(reason for check in checks for reason in check.degraded):
        table.caption = f"{table.caption or ''}degraded: {reason}\n"
    return table
