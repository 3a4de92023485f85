"""What must hold for any bytes at all. The first byte of a case says into pieces of what size the rest is cut."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from relay.core.dialect import Meter
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import ChunkDecoder, CloseDecoder, decode_into
from relay.core.request import Route
from relay.core.sse import FrameFinder, missing_blank_line, split_frames
from tests.conformance import llhttp

#: What the relay reads and llhttp refuses. Chunk extensions: they are dropped, so that of their grammar only line ends
#: and control bytes matter, and white space before one is part of it (RFC 9112 §7.1.1). ``Content-Length`` among the
#: trailers: they are dropped as well, and in a request this one is refused (RFC 9110 §6.5.1).
_ACCEPTED_DIFFERENCES: Final = re.compile(rb"(?i)[0-9a-f]+[ \t]*;|\r\ncontent-length:")


def _pieces(case: bytes) -> tuple[bytes, list[bytes]]:
    size, data = (case[0] % 32 + 1 if case else 1), case[1:]
    return data, [data[start : start + size] for start in range(0, len(data), size)]


def framing(case: bytes) -> None:
    """A chunked body: the same however it is cut, and the same to llhttp; or refused."""
    data, pieces = _pieces(case)
    whole, cut = ChunkDecoder(), ChunkDecoder()
    payload, again = bytearray(), bytearray()
    end = decode_into(payload, whole, data)
    cut_end = 0
    for piece in pieces:
        cut_end += decode_into(again, cut, piece)
    assert payload == again
    assert whole.is_done == cut.is_done
    assert (whole.error and whole.error.position) == (cut.error and cut.error.position)
    if whole.is_done:
        assert end == cut_end
        seen = llhttp.chunked_body(data[:end])
        if _ACCEPTED_DIFFERENCES.search(data[:end]) is None or seen.error is None:
            assert seen.is_one, seen
            assert seen.body == payload
            assert tuple(name for name, _ in seen.trailers) == whole.trailer_names


def _relayed(decoder: ChunkDecoder | CloseDecoder, pieces: list[bytes]) -> tuple[FrameRelay, bytes]:
    relay = FrameRelay(decoder, Meter(Route.CHAT), is_chunked=True, max_frame_bytes=64)
    out: Pieces = []
    sent = bytearray()
    for piece in pieces:
        buffer = bytearray(piece)
        relay.feed(piece, memoryview(buffer), out)
        sent += b"".join(out)
        out.clear()
        buffer[:] = b"\xaa" * len(buffer)
    decoder.at_close()
    if decoder.is_done:
        relay.finish(out)
        sent += b"".join(out)
    return relay, bytes(sent)


def frames(case: bytes) -> None:
    """An event stream: what the client gets is what the engine sent, whole frames in whole chunks."""
    data, pieces = _pieces(case)
    _boundaries(data, pieces)
    for decoder in (CloseDecoder(), ChunkDecoder()):
        payload = bytearray()
        reference = type(decoder)()
        decode_into(payload, reference, data)
        relay, sent = _relayed(decoder, pieces)
        assert decoder.is_done or decoder.error is not None
        got = bytearray()
        seen = ChunkDecoder()
        assert decode_into(got, seen, sent) == len(sent)
        assert seen.error is None, (seen.error, sent)
        assert seen.is_done == decoder.is_done
        if decoder.is_done:
            assert got.startswith(payload)
            assert bytes(got[len(payload) :]) in (b"", b"\n", b"\r", b"\r\n", b"\n\n")
            assert llhttp.chunked_body(sent).is_one
        else:
            assert payload.startswith(got)
            assert seen.is_between_chunks
            assert got + relay.pending == payload


def _boundaries(data: bytes, pieces: list[bytes]) -> None:
    """Where frames end does not depend on how the stream is cut, and every frame is counted."""
    whole, cut = FrameFinder(), FrameFinder()
    last = max(whole.feed(data, 0, len(data)), 0)
    offset = last_cut = 0
    for piece in pieces:
        boundary = cut.feed(piece, 0, len(piece))
        last_cut = offset + boundary if boundary >= 0 else last_cut
        offset += len(piece)
    assert (last, whole.frames, whole.at_boundary) == (last_cut, cut.frames, cut.at_boundary)
    runs = [data[begin:end] for begin, end in split_frames(data, 0, last)]
    assert b"".join(runs) == data[:last]
    rest = data[last:]
    if missing := missing_blank_line(rest):
        finder = FrameFinder()
        assert finder.feed(rest + missing, 0, len(rest + missing)) == len(rest + missing)


CHECKS: Final[dict[str, Callable[[bytes], None]]] = {"framing": framing, "frames": frames}
