"""The built-in engine: a paced stand-in for vLLM, byte for byte on the wire, with faults on request.

Why it exists: a relay is tested against what engines really send, at real paces and in real failures, and a real vLLM
is neither at hand everywhere nor willing to die in mid-frame on request. `relay demo`, the end-to-end tests and the
benchmarks all use it. Formats follow recordings of vLLM 0.32; ``tests/bench`` compares the two.

    async with trio.open_nursery() as nursery:
        engine = await nursery.start(serve_engine, EngineConfig(ttft_ms=50, step_ms=20))
        ... engine.url, engine.stats(), engine.requests() ...

Pure (no sockets, no clock): `ask`, `chat`, `completions`, `responses`, `messages`, `usage`, `text`, `faults`, `wire`,
`recording`, `plain`. On trio: `scheduler` (the decode loop), `connection`, `server`. Between them: `ledger`.
"""

from relay_bench.engine.config import EngineConfig
from relay_bench.engine.server import Engine, serve_engine

__all__ = ["Engine", "EngineConfig", "serve_engine"]
