"""The built-in engine, for tests that need nothing special of it."""

from __future__ import annotations

import pytest
import trio

from relay_bench.engine import Engine, EngineConfig, serve_engine


@pytest.fixture
async def engine(nursery: trio.Nursery) -> Engine:
    started: Engine = await nursery.start(serve_engine, EngineConfig())
    return started


@pytest.fixture
async def second_engine(nursery: trio.Nursery) -> Engine:
    started: Engine = await nursery.start(serve_engine, EngineConfig())
    return started
