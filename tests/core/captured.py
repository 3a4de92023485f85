"""The recordings in ``tests/captures``, read by the plainest code that will do: an oracle for the real decoders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from relay.core.request import Route, route_of

CAPTURES = Path(__file__).parent.parent / "captures"


@dataclass(frozen=True)
class Captured:
    """One recorded answer."""

    name: str
    route: Route
    status: int
    headers: list[tuple[bytes, bytes]]
    raw_body: bytes  #: as it came, with its chunked framing
    body: bytes  #: the payload
    is_complete: bool  #: the framing's end was recorded

    @property
    def is_stream(self) -> bool:
        """Whether it is an event stream."""
        return dict(self.headers).get(b"content-type", b"").startswith(b"text/event-stream")

    def __repr__(self) -> str:
        return self.name


def dechunk(raw: bytes) -> tuple[bytes, bool]:
    """The payload of a chunked body, cut off anywhere, and whether its end was there. Trusts what it reads."""
    payload = b""
    while b"\r\n" in raw:
        line, _, rest = raw.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if size == 0:
            return payload, rest.endswith(b"\r\n")
        payload += rest[:size]
        raw = rest[size + 2 :]
    return payload, False


def frames_of(body: bytes) -> list[bytes]:
    """The frames of a body with LF line ends, each with its blank line; a rest without one comes last."""
    *whole, rest = body.split(b"\n\n")
    return [frame + b"\n\n" for frame in whole] + ([rest] if rest else [])


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The JSON objects in the ``data`` of an event stream."""
    lines = [line.removeprefix(b"data:").strip() for line in body.split(b"\n") if line.startswith(b"data:")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


@cache
def captured() -> tuple[Captured, ...]:
    """All recorded answers with a body to speak of."""
    paths = _paths()
    return tuple(
        _parse(str(file.relative_to(CAPTURES)).removesuffix(".response.raw"), file.read_bytes(), paths)
        for file in sorted(CAPTURES.rglob("*.response.raw"))
    )


@cache
def streams() -> tuple[Captured, ...]:
    """All recorded event streams."""
    return tuple(answer for answer in captured() if answer.is_stream)


def stream(name: str) -> Captured:
    """The recorded event stream of that name."""
    return next(answer for answer in streams() if answer.name == name)


def _paths() -> dict[str, str]:
    paths = {}
    for index in CAPTURES.rglob("index.jsonl"):
        folder = index.parent.relative_to(CAPTURES)
        for line in index.read_text().splitlines():
            entry = json.loads(line)
            paths[str(folder / entry["name"])] = entry["path"]
    return paths


def _parse(name: str, raw: bytes, paths: dict[str, str]) -> Captured:
    head, _, body = raw.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    status_line, *lines = head.split(b"\r\n")
    headers = [(key.lower(), value.strip()) for key, _, value in (line.partition(b":") for line in lines)]
    payload, is_complete = dechunk(body) if (b"transfer-encoding", b"chunked") in headers else (body, True)
    route = route_of(paths.get(name, "/v1/chat/completions").encode())
    return Captured(name, route, int(status_line.split()[1]), headers, body, payload, is_complete)
