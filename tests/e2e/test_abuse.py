"""The abuse drill, in small: kept by this relay, and broken by one without its limits."""

from __future__ import annotations

from typing import Final

import msgspec
import pytest
import trio

from relay_bench.drill import abuse
from relay_bench.drill.stage import Scene
from tests.e2e.test_drills import kept, sabotaged

GAPS: Final = ("healthy p99 gap within 2 × of without", "healthy largest gap within 1 s, or 2 × of without")
#: What is promised of each attack, in the order in which they come.
CRITERIA: Final = {
    "connection churn": (
        "none is refused",
        "no descriptor stays",
        "memory grows by no more than 8.0 MiB (a constant)",
    ),
    "slowloris on the head": (
        "told 408",
        "each within client_head_s = 0.2 s and 2 s",
        "memory grows by no more than 5.2 MiB (20 × max_head_bytes, and 4 MiB)",
    ),
    "slowloris on the body": (
        "told 408",
        "each within client_body_s = 0.2 s and 2 s",
        "memory grows by no more than 5.2 MiB (20 × a read of 64 KiB, and 4 MiB)",
    ),
    "idle connections": (
        "no more are open than max_connections = 500, and 2 just begun to engines",
        "9 in 10 of max_connections are in use",
        "who idles longest makes room, others wait, and none is refused",
        "a newcomer is answered within 5 s",
        "memory grows by no more than 11.9 MiB (500 × 8 KiB, and 8 MiB)",
    ),
    "head bombs": (
        "told 431",
        "memory grows by no more than 9.2 MiB (10 × max_head_bytes, twice, and 8 MiB)",
    ),
    "slow readers": (
        "none is cut off",
        "memory grows by no more than 15.2 MiB (20 × two frames and a read of 64 KiB, and 4 MiB)",
    ),
    "bodies announced too large": (
        "told 413",
        "memory grows by no more than 8.6 MiB (10 × a read of 64 KiB, and 8 MiB)",
    ),
    "bodies too large": (
        "told 408 or 413 or 503",
        "memory grows by no more than 28.0 MiB (max_buffered_bytes, twice, and 8 MiB)",
    ),
    "bodies held": (
        "told 408 or 503",
        "memory grows by no more than 28.0 MiB (max_buffered_bytes, twice, and 8 MiB)",
    ),
}
AT_LAST: Final = (
    "nor does a healthy client fail between two attacks",
    "all load counts are back at zero",
    "the engines run nothing",
    "no connection has leaked",
    "the relay has met no fault of its own, and ends in order",
)


def test_abuse_is_survived(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Gaps are left to longer drills: of half a second, one turn of another process may be the largest."""
    status, report = kept(capsysbinary, "abuse")
    of_all = (*GAPS, "no healthy client fails")
    promised = {f"{attack}: {text}" for attack, criteria in CRITERIA.items() for text in (*of_all, *criteria)}
    assert sorted(promise.text for promise in report.promises) == sorted(promised | {*AT_LAST})
    assert [text for text in report.broken if not text.endswith(GAPS)] == []
    assert status == bool(report.broken)
    figures = dict(report.figures)
    assert CRITERIA.keys() - figures.keys() == {"idle connections"}
    (seen,) = (promise.seen for promise in report.promises if "makes room" in promise.text)
    assert int(seen.split()[0].replace(",", "")) > abuse.QUICK.idle  # they have come again


def test_abuse_of_a_relay_without_limits() -> None:
    """Nor does it take turns: it stands still for 2 s, once."""
    command = sabotaged(
        "import time",
        "from relay.daemon import worker",
        "from relay.net.budget import BodyBudget",
        "from relay.net.downstream import ClientConnection",
        "worker.Worker._is_full = False",
        "ClientConnection._limit_now = lambda self: 0",
        "BodyBudget.take_now = lambda self, size, **_: True",
        "refuse = worker.refuse",
        "async def freeze(*of_whom):",
        "    kept.append(of_whom)",
        "    time.sleep(2 if len(kept) == 1 else 0)",
        "    await refuse(*of_whom)",
        "worker.refuse = freeze",
    )
    plan = msgspec.structs.replace(abuse.QUICK, patience_s=1.0, idle=700, bombs=20)
    broken = trio.run(abuse.drill, Scene(command=command), plan).broken
    assert {
        "slowloris on the head: told 408",
        "slowloris on the body: told 408",
        "idle connections: no more are open than max_connections = 500, and 2 just begun to engines",
        "idle connections: who idles longest makes room, others wait, and none is refused",
        "bodies held: told 408 or 503",
    } <= set(broken)
    # Beside one of them at least: the memory that the first has taken is there for the second.
    memory = "memory grows by no more than 48.0 MiB (max_buffered_bytes, twice, and 8 MiB)"
    assert {f"{attack}: {memory}" for attack in ("bodies too large", "bodies held")} & set(broken)
    assert any(text.endswith(GAPS[1]) for text in broken)
