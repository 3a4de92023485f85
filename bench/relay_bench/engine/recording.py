"""Answers recorded from a real engine, to be sent again: ``x-sim-play``."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from relay.core.framing import ChunkDecoder, decode_into
from relay_bench.engine.plain import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

_FRAME = re.compile(rb"(?s).*?(?:\n\n|\Z)")


class Recording(msgspec.Struct, frozen=True):
    """One recorded answer without its framing."""

    status: int
    content_type: bytes
    body: bytes

    @property
    def is_stream(self) -> bool:
        """Whether it was an event stream."""
        return self.content_type.startswith(b"text/event-stream")

    def steps(self) -> Iterator[list[bytes]]:
        """The frames, one to a step, cut at blank lines; a body that is no event stream is one frame."""
        frames = [f for f in _FRAME.findall(self.body) if f] if self.is_stream else [self.body]
        return ([frame] for frame in frames)


def parse_recording(raw: bytes) -> Recording:
    """A ``.response.raw`` file: status line, headers and body as received; interim answers are skipped."""
    while True:
        head, _, rest = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        status = int(lines[0].split(b" ")[1])
        if status >= 200:
            break
        raw = rest
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    if fields.get(b"transfer-encoding") == b"chunked":
        payload = bytearray()
        decode_into(payload, ChunkDecoder(), rest)  # of one that was cut off, what had arrived
        rest = bytes(payload)
    return Recording(status, fields.get(b"content-type", b""), rest)


def load_recording(folder: str, name: str) -> Recording:
    """The recording `name`; raises `Refusal` if there is none. Names have no folders in them: none leaves `folder`."""
    path = Path(folder) / f"{name}.response.raw"
    if not folder or not name or Path(name).name != name or not path.is_file():
        raise Refusal(
            400, f"x-sim-play: there is no recording {name!r}; see --captures", "BadRequestError", "x-sim-play"
        )
    return _parsed(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _parsed(path: Path, _changed_ns: int) -> Recording:
    return parse_recording(path.read_bytes())
