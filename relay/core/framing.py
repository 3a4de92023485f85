"""Where the body of an engine's answer ends, and what of the bytes received belongs to it (RFC 9112 §6.3 and §7.1).

h11 reads heads; bodies are decoded here, because they pass once per token and h11 copies each piece twice. A decoder
works in place: it is shown a buffer and a range, and answers with the range of the next run of payload in that same
buffer. Nothing is copied but the unfinished line of a chunk header.

Decoders never raise while they read. A malformed body ends at its first bad byte: everything before it has been
answered, `error` says what is wrong and `position` where, and the caller decides what a broken answer means.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from enum import Enum
from typing import Final

Buffer = bytes | bytearray

#: Longest chunk header accepted, size and extensions together. Engines send none over 10 bytes.
MAX_CHUNK_HEADER_BYTES: Final = 4096
#: Most trailer bytes read (and dropped) after the last chunk.
MAX_TRAILER_BYTES: Final = 16384

# chunk-size is at most 15 digits: beyond any real body, and it cannot overflow what follows.
# Extensions may hold anything printable (RFC 9112 §7.1.1: a recipient ignores those it does not know). White space is
# theirs alone: behind a bare size the grammar has none, and llhttp refuses it.
_CHUNK_HEADER: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")

_NOTHING: Final = -1


class FramingError(Exception):
    """A body breaks the rules of its framing. `position` counts from the first byte of the body as sent."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} at byte {position} of the body")
        self.position = position


class BodyKind(Enum):
    """How the end of a body is marked."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


def response_body_kind(method: bytes, status: int, version: bytes, headers: list[tuple[bytes, bytes]]) -> BodyKind:
    """Tells how the body of a response ends (RFC 9112 §6.3), from lower-cased header names.

    Raises `FramingError` where the head contradicts itself: both kinds of framing, or codings other than ``chunked``
    alone. An intermediary that guesses there invites response splitting, so the answer is refused as nginx refuses it.
    """
    if method == b"HEAD" or status < 200 or status in (204, 304):
        return BodyKind.NONE
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    lengths = {value for name, value in headers if name == b"content-length"}
    if codings:
        if lengths:
            raise FramingError("both Transfer-Encoding and Content-Length", 0)
        if version < b"1.1":
            raise FramingError("Transfer-Encoding in an HTTP/1.0 answer", 0)
        if codings != [b"chunked"]:
            raise FramingError(f"Transfer-Encoding is not just chunked: {b', '.join(codings)!r}", 0)
        return BodyKind.CHUNKED
    if not lengths:
        return BodyKind.CLOSE
    if len(lengths) > 1:
        raise FramingError("differing Content-Length values", 0)
    if not lengths.pop().isdigit():
        raise FramingError("Content-Length is not a number", 0)
    return BodyKind.LENGTH


class BodyDecoder(ABC):
    """Finds the payload in what arrives of one body."""

    __slots__ = ("error", "is_done")

    def __init__(self) -> None:
        self.is_done = False  #: the body has ended, as its framing says
        self.error: FramingError | None = None  #: the first thing wrong with it; nothing after that byte is read

    @abstractmethod
    def next(self, buffer: Buffer, start: int, stop: int) -> tuple[int, int, int]:
        """Answers ``(begin, end, position)``: the next run of payload, and where to go on reading.

        ``begin == end`` where only framing was consumed. Call again while ``position < stop`` and neither `is_done`
        nor `error` is set; what then lies between ``position`` and ``stop`` is not part of the body.
        """

    @abstractmethod
    def at_close(self) -> None:
        """Takes note that the peer has closed: ends a close-delimited body, and is an `error` in any other."""


class LengthDecoder(BodyDecoder):
    """A body of ``Content-Length`` bytes (RFC 9112 §6.2); also, with 0, no body at all."""

    __slots__ = ("left", "length")

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.left = length
        self.is_done = length == 0

    def next(self, buffer: Buffer, start: int, stop: int) -> tuple[int, int, int]:
        """See `BodyDecoder.next`."""
        end = min(stop, start + self.left)
        self.left -= end - start
        self.is_done = not self.left
        return start, end, end

    def at_close(self) -> None:
        """See `BodyDecoder.at_close`."""
        if not self.is_done:
            self.error = FramingError(
                f"closed with {self.left} of {self.length} bytes missing", self.length - self.left
            )


class CloseDecoder(BodyDecoder):
    """A body that lasts until its sender closes (RFC 9112 §6.3, rule 8)."""

    __slots__ = ()

    def next(self, buffer: Buffer, start: int, stop: int) -> tuple[int, int, int]:
        """See `BodyDecoder.next`."""
        return start, stop, stop

    def at_close(self) -> None:
        """See `BodyDecoder.at_close`."""
        self.is_done = True


class ChunkDecoder(BodyDecoder):
    """A chunked body (RFC 9112 §7.1): strict about line ends and sizes, since what it accepts is sent on.

    Extensions are skipped. Trailers are read and dropped but for their names: nothing the relay does depends on them
    (RFC 9110 §6.5.1).
    """

    __slots__ = ("_line", "_seen", "_trailer_bytes", "left", "trailer_names")

    # What `left` means beside a number of payload bytes.
    HEADER: Final = -1
    DATA_END: Final = -2
    TRAILER: Final = -3

    def __init__(self) -> None:
        super().__init__()
        self.left = self.HEADER
        self._line = bytearray()  # of a header or trailer line, what earlier reads brought
        self._seen = 0  # bytes of the body before the range being read
        self._trailer_bytes = 0
        self.trailer_names: tuple[bytes, ...] = ()  #: of the fields behind the last chunk, in lower case

    @property
    def is_between_chunks(self) -> bool:
        """Whether the next byte is the first of a chunk header."""
        return self.left == self.HEADER and not self._line

    def skip(self, length: int) -> None:
        """Takes note that the caller has read `length` bytes of whole chunks by itself."""
        self._seen += length

    def skip_last(self, length: int) -> None:
        """Takes note that the caller has read the last chunk, of `length` bytes and without trailers, by itself."""
        self._seen += length
        self.left = self.TRAILER
        self.is_done = True

    def next(self, buffer: Buffer, start: int, stop: int) -> tuple[int, int, int]:
        """See `BodyDecoder.next`."""
        position = start
        while position < stop and not self.is_done and self.error is None:
            if self.left > 0:
                end = min(stop, position + self.left)
                self.left -= end - position
                if not self.left:
                    self.left = self.DATA_END
                self._seen += end - start
                return position, end, end
            position = self._read_line(buffer, position, stop, position - start)
        self._seen += position - start
        return position, position, position

    def at_close(self) -> None:
        """See `BodyDecoder.at_close`."""
        if not self.is_done and self.error is None:
            self.error = FramingError("closed before the last chunk", self._seen)

    def _read_line(self, buffer: Buffer, position: int, stop: int, offset: int) -> int:
        """Reads up to the end of the current line, or to `stop`; answers the position reached."""
        newline = buffer.find(b"\n", position, stop)
        end = stop if newline < 0 else newline + 1
        line = self._line
        # Where the line being read began, counted from the start of the body.
        line_start = self._seen + offset - len(line)
        line += buffer[position : min(end, position + MAX_CHUNK_HEADER_BYTES + 1 - len(line))]
        if newline < 0 and len(line) <= MAX_CHUNK_HEADER_BYTES and self._may_continue(line):
            return end
        self._take_line(line, line_start)
        line.clear()
        return end

    def _may_continue(self, line: bytearray) -> bool:
        """Whether an unfinished line can still become a right one: what follows data must be CR LF and nothing else."""
        return self.left != self.DATA_END or line == b"\r"

    def _take_line(self, line: bytearray, line_start: int) -> None:
        if self.left == self.DATA_END:
            if line != b"\r\n":
                self.error = FramingError("chunk is longer than its size", line_start)
            self.left = self.HEADER
        elif self.left == self.HEADER:
            header = _CHUNK_HEADER.fullmatch(line)
            if header is None:
                self.error = FramingError(f"not a chunk header: {bytes(line[:40])!r}", line_start)
            else:
                self.left = int(header[1], 16) or self.TRAILER
        elif line == b"\r\n":
            self.is_done = True
        else:
            self._trailer_bytes += len(line)
            if _TRAILER_LINE.fullmatch(line) is None:
                self.error = FramingError(f"not a trailer field: {bytes(line[:40])!r}", line_start)
            elif self._trailer_bytes > MAX_TRAILER_BYTES:
                self.error = FramingError(f"more than {MAX_TRAILER_BYTES} bytes of trailers", line_start)
            else:
                self.trailer_names += (bytes(line.partition(b":")[0]).lower(),)


#: What a digit of a chunk's size stands for; 16: it is none.
_DIGITS: Final = bytes(b"0123456789abcdef".find(bytes([byte]).lower()) % 17 for byte in range(256))
_MOST_DIGITS: Final = 8


def size_at(data: bytes, position: int) -> tuple[int, int]:
    """The size of the chunk at `position`, and where its digits end: at `position`, where there are none.

    Eight digits are read, which is beyond any read; a ninth is what stands behind them.
    """
    size, end = 0, position
    most = min(len(data), position + _MOST_DIGITS)
    while end < most and (digit := _DIGITS[data[end]]) < 16:
        size = size * 16 + digit
        end += 1
    return size, end


def decode_into(payload: bytearray, decoder: BodyDecoder, buffer: Buffer) -> int:
    """Appends to `payload` what is payload in `buffer`; answers how far that was read."""
    position = 0
    while position < len(buffer) and not decoder.is_done and decoder.error is None:
        begin, end, position = decoder.next(buffer, position, len(buffer))
        payload += buffer[begin:end]
    return position


def decoder_for(kind: BodyKind, headers: list[tuple[bytes, bytes]]) -> BodyDecoder:
    """A fresh decoder for a body of the given kind; the length comes from `headers`."""
    if kind is BodyKind.CHUNKED:
        return ChunkDecoder()
    if kind is BodyKind.CLOSE:
        return CloseDecoder()
    if kind is BodyKind.LENGTH:
        for name, value in headers:
            if name == b"content-length":
                return LengthDecoder(int(value))
    return LengthDecoder(0)
