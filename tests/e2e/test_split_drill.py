"""The drill of the split mode, in small: kept by this relay, and broken by one that leaves handles where they are."""

from __future__ import annotations

import msgspec

from relay_bench.drill.split import QUICK, drill
from relay_bench.drill.stage import Scene

#: Nobody stays, so that many leave between the legs.
RESTLESS = msgspec.structs.replace(QUICK, hang_ups=1.0)


async def test_hang_ups_leave_no_handle() -> None:
    report = await drill(Scene(), RESTLESS)
    assert report.broken == []
    assert len(report.promises) == 8


async def test_handles_that_nobody_drains_are_found() -> None:
    report = await drill(Scene(settings={"pool.drain_kv": "false"}, settle_s=1.0), RESTLESS)
    assert report.broken == ["no handle is left at a prefiller"]
