"""The two halves of a split request: the handle by which a decoder fetches the KV cache (vLLM's NixlConnector).

A prefiller holds what a handle names until a decoder has fetched it, for ever if none does: there is no timer here, so
what is stranded is seen. The decoder asks for it over HTTP at the address in the handle (``/sim/take``), before it
begins; where it is not to be had, the answer ends as vLLM's does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec
import trio

if TYPE_CHECKING:
    from relay_bench.engine.ask import Ask

#: Tokens in a block of the recorded engine's KV cache.
_BLOCK_TOKENS: Final = 16
#: Seconds for a prefiller to hand over; NIXL's handshake gives up about as soon.
_PATIENCE_S: Final = 5.0


class Handles:
    """The handles of one prefiller."""

    def __init__(self) -> None:
        self.given = 0
        self.taken = 0
        self.held: set[str] = set()

    def give(self, handle: str) -> None:
        """An answer that holds the handle is on its way."""
        self.given += 1
        self.held.add(handle)

    def take(self, handle: str) -> bool:
        """A decoder has fetched what it names; whether it was there."""
        if handle not in self.held:
            return False
        self.held.remove(handle)
        self.taken += 1
        return True

    def as_dict(self) -> dict[str, int]:
        """Counts, for ``/sim/requests``."""
        return {"handles_given": self.given, "handles_taken": self.taken, "handles_held": len(self.held)}

    def __repr__(self) -> str:
        return f"<Handles {self.as_dict()}>"


def handle_id(ask: Ask) -> str:
    """What the request is called between the two engines; empty: nothing is to be held for it."""
    return f"{ask.id}-8794c0af" if ask.wants_kv_handle and not ask.stream else ""


def kv_handle(ask: Ask) -> dict[str, Any] | None:
    """``kv_transfer_params`` of a non-streaming answer: the handle if the request says ``do_remote_decode``."""
    if not ask.wants_kv_handle:
        return None
    host, port = ask.address
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(range(1, ask.prompt_tokens // _BLOCK_TOKENS + 2))],
        "remote_engine_id": "5b40f664-eb9f-4c82-9265-496ee719496e",
        "remote_request_id": handle_id(ask),
        "remote_host": host,
        "remote_port": port,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": ask.prompt_tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_prefill_cached_tokens": 0,
    }


class _Params(msgspec.Struct):
    do_remote_prefill: bool = False
    remote_request_id: str = ""
    remote_host: str = ""
    remote_port: int = 0


class _Request(msgspec.Struct):
    kv_transfer_params: _Params | None = None


async def is_lost(body: bytes) -> bool:
    """Whether a request names a handle that is not to be had; otherwise what it names has been fetched."""
    if b'"remote_request_id"' not in body:
        return False
    try:
        params = msgspec.json.decode(body, type=_Request).kv_transfer_params
    except msgspec.DecodeError:
        return False
    if params is None or not params.do_remote_prefill:
        return False
    path = f"/sim/take?handle={quote(params.remote_request_id)}"
    with trio.move_on_after(_PATIENCE_S):
        try:
            async with await trio.open_tcp_stream(params.remote_host, params.remote_port) as stream:
                await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: decoder\r\nconnection: close\r\n\r\n".encode())
                return not (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        except (OSError, trio.BrokenResourceError):
            pass
    return True
