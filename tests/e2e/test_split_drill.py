"""The drill of the split mode, in small: kept by this relay, and broken by one that leaves handles where they are."""

from __future__ import annotations

import msgspec

from relay_bench.drill.report import Report
from relay_bench.drill.split import QUICK, drill
from relay_bench.drill.stage import Scene

#: Nobody stays, so that many leave between the legs.
RESTLESS = msgspec.structs.replace(QUICK, hang_ups=1.0)
PATIENT = msgspec.structs.replace(RESTLESS, wait_s=4 * RESTLESS.wait_s)


async def held(scene: Scene) -> Report:
    """Once more with clients that leave later, where a busy machine let none of them get as far as the last phase."""
    report = await drill(scene, RESTLESS)
    return await drill(scene, PATIENT) if "clients have hung up in all phases" in report.broken else report


async def test_hang_ups_leave_no_handle() -> None:
    report = await held(Scene())
    assert report.broken == []
    assert len(report.promises) == 8


async def test_handles_that_nobody_drains_are_found() -> None:
    report = await held(Scene(settings={"pool.drain_kv": "false"}, settle_s=1.0))
    assert report.broken == ["no handle is left at a prefiller"]
