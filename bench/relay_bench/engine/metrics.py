"""``GET /metrics`` in the names of vLLM 0.32 (`v1/metrics/loggers.py`), those that a router or a dashboard reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from relay_bench.engine.ledger import State

if TYPE_CHECKING:
    from relay_bench.engine.config import EngineConfig
    from relay_bench.engine.ledger import Ledger

CONTENT_TYPE: Final = b"text/plain; version=1.0.0; charset=utf-8"


def metrics_text(config: EngineConfig, ledger: Ledger) -> bytes:
    """The page."""
    labels = f'engine="0",model_name="{config.model}"'
    blocks = config.prefix_cache_blocks
    values: list[tuple[str, str, float]] = [
        ("num_requests_running", "gauge", ledger.counts[State.RUNNING]),
        ("num_requests_waiting", "gauge", ledger.counts[State.QUEUED]),
        ("kv_cache_usage_perc", "gauge", min(ledger.blocks_in_use / blocks, 1.0) if blocks else 0.0),
        ("prefix_cache_queries_total", "counter", ledger.cache_queries),
        ("prefix_cache_hits_total", "counter", ledger.cache_hits),
        ("prompt_tokens_total", "counter", ledger.prompt_tokens),
        ("generation_tokens_total", "counter", ledger.generation_tokens),
    ]
    lines = []
    for name, kind, value in values:
        lines += [f"# TYPE vllm:{name} {kind}", f"vllm:{name}{{{labels}}} {float(value)}"]
    name = "vllm:time_to_first_token_seconds"
    lines += [f"# TYPE {name} histogram", *ledger.first_tokens.lines(name, labels)]
    return ("\n".join(lines) + "\n").encode()
