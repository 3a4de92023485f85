"""The built-in engine, for tests that need nothing special of it; and the two forms of the pump."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import trio

from relay.net import poller
from relay_bench.engine import Engine, EngineConfig, serve_engine


@pytest.fixture
async def engine(nursery: trio.Nursery) -> Engine:
    started: Engine = await nursery.start(serve_engine, EngineConfig())
    return started


@pytest.fixture
async def second_engine(nursery: trio.Nursery) -> Engine:
    started: Engine = await nursery.start(serve_engine, EngineConfig())
    return started


@pytest.fixture(params=["in trio's poller", "as a task"])
def pump_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which the pump is driven; the second is what a trio with unknown insides gets."""
    if request.param == "as a task":
        monkeypatch.setattr(poller, "install", lambda pump: nullcontext(False))
    return str(request.param)
