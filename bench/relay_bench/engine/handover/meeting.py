"""A request's part with the other engine, done: over HTTP at ``/sim/take`` and ``/sim/give`` of the other stand-in.

Waits are the caller's to limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

import trio

if TYPE_CHECKING:
    from relay_bench.engine.handover.handles import Handles
    from relay_bench.engine.handover.part import Meeting, Part


async def begin(part: Part, handles: Handles) -> bool:
    """What comes before the answer; whether all that the request needs has been had."""
    if part.is_lost:
        return False
    if part.calls is not None:
        await _call(*part.calls)
    if part.meets:
        await handles.taker(part.meets)
    if part.takes is None:
        return True
    if part.takes.host:
        return await _ask("/sim/take", part.takes, waits=part.waits)
    return await handles.take_soon(part.takes.handle) if part.waits else handles.take(part.takes.handle)


async def push(meeting: Meeting) -> None:
    """Gives a decoder what it names."""
    await _ask("/sim/give", meeting)


async def _ask(path: str, meeting: Meeting, *, waits: bool = False) -> bool:
    """Whether the other engine says 200; one that is not there says nothing."""
    fields = {"handle": meeting.handle, "engine": meeting.engine_id, "wait": "1" if waits else ""}
    head = f"GET {path}?{urlencode(fields)} HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n\r\n"
    return await _status(meeting.host, meeting.port, head.encode()) == b"200"


async def _call(url: str, message: bytes) -> None:
    """vllm-ascend's decoder takes any answer for a success (`mooncake_layerwise_connector.py` `_access_metaserver`)."""
    parts = urlsplit(url)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(message)}\r\nconnection: close\r\n\r\n"
    )
    await _status(parts.hostname or "", parts.port or 80, head.encode() + message)


async def _status(host: str, port: int, request: bytes) -> bytes:
    """The status of the answer; empty: there is none."""
    try:
        async with await trio.open_tcp_stream(host, port) as stream:
            await stream.send_all(request)
            return (await stream.receive_some())[9:12]
    except (OSError, trio.BrokenResourceError):
        return b""
