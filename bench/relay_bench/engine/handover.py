"""The prefill half of a split request: the handle by which a decoder fetches the KV cache (vLLM's NixlConnector)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay_bench.engine.ask import Ask

#: Tokens in a block of the recorded engine's KV cache.
_BLOCK_TOKENS = 16


def kv_handle(ask: Ask) -> dict[str, Any] | None:
    """``kv_transfer_params`` of a non-streaming answer: the handle if the request says ``do_remote_decode``."""
    if not ask.wants_kv_handle:
        return None
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(range(1, ask.prompt_tokens // _BLOCK_TOKENS + 2))],
        "remote_engine_id": "5b40f664-eb9f-4c82-9265-496ee719496e",
        "remote_request_id": f"{ask.id}-8794c0af",
        "remote_host": "127.0.0.1",
        "remote_port": 5601,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": ask.prompt_tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_prefill_cached_tokens": 0,
    }
